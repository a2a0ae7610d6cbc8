package org.gemmaedge.app.model

import java.io.File
import java.io.IOException
import java.util.Locale
import kotlinx.serialization.Serializable
import org.gemmaedge.core.ImageDecoder
import org.gemmaedge.core.UserError

/** What a phone says about itself. Part of a benchmark's report. */
@Serializable
data class Device(val model: String, val soc: String, val android: String, val abi: String, val cores: Int)

/** The system's free memory, and the free memory below which it begins to end apps; in bytes. */
class FreeMemory(val available: Long, val lowThreshold: Long)

/** What the models need of the system that they run on: Android, or a laptop in tests. */
interface Platform {
    /** The app's own folder on the external storage, where `gemma-edge push` writes too. */
    val root: File
    val device: Device

    /** The runtimes in this app. */
    val runtimes: Runtimes

    /** Decodes a picture's file. */
    val decoder: ImageDecoder

    fun freeMemory(): FreeMemory

    /** The bytes that may still be written below [root]. */
    fun freeSpace(): Long

    /** 0 (none) to 6 (shutdown), as Android's PowerManager counts. */
    fun thermalStatus(): Int

    val bundles get() = File(root, "bundles")
    val benchmarks get() = File(root, "benchmarks")
    val conversations get() = File(root, "conversations")
}

/** The words for Android's thermal statuses 0 to 6. */
val THERMAL_WORDS = listOf("cool", "light", "moderate", "severe", "critical", "emergency", "shutdown")

/** The memory of this process in RAM, in bytes, as Linux says it (0 where it does not). */
fun processMemory(): Long = status("VmRSS")

/** The part of [processMemory] that is no copy of a file: what the system gets back when a model is let go. */
fun ownMemory(): Long = status("RssAnon")

/** The most that [processMemory] ever was. */
fun peakProcessMemory(): Long = status("VmHWM")

private fun status(key: String): Long = try {
    val line = File("/proc/self/status").useLines { lines -> lines.firstOrNull { it.startsWith("$key:") } }
    line?.filter(Char::isDigit)?.toLong()?.times(1024) ?: 0
} catch (_: IOException) {
    0
}

/** An error as one sentence for the screen. */
fun sentence(error: Throwable): String {
    val text = when (error) {
        is UserError -> error.message.orEmpty()
        is OutOfMemoryError -> "the app ran out of memory; close other apps, or use a smaller model"
        is UnsatisfiedLinkError -> "this build has no library for the phone's processor (${error.message}); install another"
        is IOException -> if (FULL.any { it in error.message.orEmpty() }) {
            "the phone's storage is full; make room, then try again"
        } else {
            "reading or writing failed (${error.message ?: error.javaClass.simpleName}); try again"
        }
        else -> "an error inside the app: ${error.javaClass.simpleName} ${error.message.orEmpty()}".trim() + "; report it"
    }
    val line = text.split(Regex("\\s+")).joinToString(" ").trim()
    val isName = line.substringBefore(' ').any { it in "./_" } // of a file
    return (if (isName) line else line.replaceFirstChar(Char::uppercase)) + if (line.endsWith('.')) "" else "."
}

private val FULL = listOf("ENOSPC", "No space left")

/** A size as people read it: "2.25 GB", "812 MB", "4.2 MB". */
fun readable(bytes: Long): String = when {
    bytes >= 1_000_000_000 -> "%.2f GB".format(Locale.ROOT, bytes / 1e9)
    bytes >= 100_000_000 -> "%.0f MB".format(Locale.ROOT, bytes / 1e6)
    bytes >= 1_000_000 -> "%.1f MB".format(Locale.ROOT, bytes / 1e6)
    else -> "%.0f kB".format(Locale.ROOT, bytes / 1e3)
}
