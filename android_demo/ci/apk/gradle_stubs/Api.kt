// The few types of Gradle that the Android plugin's own API mentions, so that the android {} blocks of the build scripts
// compile against that API where Gradle is not to be had. See gradle_dsl.py.
package org.gradle.api

import java.io.File

annotation class Incubating

fun interface Action<T> {
    fun execute(value: T)
}

enum class JavaVersion { VERSION_1_8, VERSION_11, VERSION_17, VERSION_21 }

interface Named {
    fun getName(): String
}

interface NamedDomainObjectContainer<T> : Collection<T> {
    fun getByName(name: String): T

    fun create(name: String, configure: T.() -> Unit): T
}

interface ExtensiblePolymorphicDomainObjectContainer<T> : NamedDomainObjectContainer<T>

interface Project {
    val rootProject: Project

    fun file(path: Any): File
}
