package org.gemmaedge.core

import java.io.File
import kotlinx.serialization.json.Json

/** A bundle that `gemma-edge export` wrote: its folder and its manifest. */
class Bundle(val folder: File, val manifest: Manifest) {
    companion object {
        const val MANIFEST = "manifest.json"
        private val json = Json { ignoreUnknownKeys = true }

        /** Reads the manifest of [folder]. */
        fun read(folder: File): Bundle = Bundle(folder, json.decodeFromString(File(folder, MANIFEST).readText()))
    }

    /** The file [name] of the bundle. */
    fun file(name: String): File = File(folder, name)

    /** The exported graph of [format]. Throws [BadInput] when the bundle has none. */
    fun artifact(format: String): Artifact = manifest.artifacts[format]
        ?: throw BadInput("the bundle has no .$format; it has ${manifest.artifacts.keys.joinToString { ".$it" }}")
}
