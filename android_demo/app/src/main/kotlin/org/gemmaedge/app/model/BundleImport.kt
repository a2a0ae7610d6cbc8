package org.gemmaedge.app.model

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream
import java.net.SocketTimeoutException
import java.security.MessageDigest
import kotlin.coroutines.cancellation.CancellationException
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.DoesNotFit
import org.gemmaedge.core.VerificationFailed

/** The bytes of an import that are there, and all of them. [file] is the one that is copied. */
data class ImportProgress(val name: String, val file: String, val done: Long, val total: Long)

/**
 * Brings a bundle into [bundles]: the manifest first, then each file that it lists, hashed while it is copied.
 *
 * All goes into `.NAME.part`, which is renamed when everything is there and right. Files that the manifest does not list
 * are never asked for. When the import fails nothing stays behind, with one exception: if the source can go on later,
 * its files stay, unless one of them is not what the manifest says.
 */
class BundleImport(
    private val bundles: File,
    private val runtimes: Runtimes,
    private val freeSpace: () -> Long,
) {
    /**
     * Returns the imported bundle's name.
     *
     * Throws [BadInput], [DoesNotFit] or [VerificationFailed] for what does not belong here, [IOException] when the
     * source or the disk fails, and [CancellationException] once [cancelled] says so.
     */
    fun run(source: BundleSource, cancelled: () -> Boolean, progress: (ImportProgress) -> Unit): String {
        val name = safeName(source.name)
        val target = File(bundles, name)
        if (target.exists()) throw BadInput("the app has a model named $name already; delete it first")
        val part = File(bundles, ".$name.part")
        var keep = false
        try {
            copy(source, name, part, cancelled, progress)
            Bundle.read(part)
            if (!part.renameTo(target)) throw IOException("$part cannot be renamed to $name")
            return name
        } catch (error: Exception) {
            keep = source.resumes && error !is VerificationFailed && part.walk().any(File::isFile)
            throw error
        } finally {
            if (!keep) part.deleteRecursively()
        }
    }

    private fun copy(
        source: BundleSource, name: String, part: File, cancelled: () -> Boolean, progress: (ImportProgress) -> Unit,
    ) {
        if (!part.isDirectory && !part.mkdirs()) throw IOException("$part cannot be made")
        val bytes = readManifest(source, cancelled)
        val manifest = Bundle.parse(bytes)
        val sizes = manifest.files
        sizes.keys.forEach(::checkName)
        manifest.artifacts.map { (format, artifact) -> runtimes.problem(format, artifact) }.let { problems ->
            if (problems.isNotEmpty() && problems.all { it != null }) throw BadInput(problems.first()!!)
        }
        removeStrangers(part, sizes.keys)
        val total = sizes.values.sumOf { it.size }
        val there = sizes.keys.sumOf { File(part, it).length() }
        val free = freeSpace()
        if (total - there > free) {
            throw DoesNotFit(
                "the model takes ${readable(total - there)} of storage, and ${readable(free)} are free; make room first",
            )
        }
        var done = 0L
        for ((path, entry) in sizes) {
            val file = File(part, path)
            file.parentFile!!.mkdirs()
            FileCopy(source, path, entry.size, file, cancelled) { progress(ImportProgress(name, path, done + it, total)) }
                .run(entry.sha256)
            done += entry.size
        }
        File(part, MANIFEST).writeBytes(bytes)
    }

    private fun readManifest(source: BundleSource, cancelled: () -> Boolean): ByteArray {
        val opened = source.open(MANIFEST, 0)
        val bytes = opened.stream.use { it.readUpTo(MAX_MANIFEST + 1, cancelled) }
        if (bytes.size > MAX_MANIFEST) throw BadInput("$MANIFEST has over $MAX_MANIFEST bytes; it is not a bundle's")
        if (opened.total != null && opened.total != bytes.size.toLong()) throw IOException("$MANIFEST is cut short")
        return bytes
    }

    companion object {
        const val MANIFEST = Bundle.MANIFEST
        private const val MAX_MANIFEST = Bundle.LARGEST_MANIFEST

        /** A bundle's files are in its folder, or in proof/. */
        private fun checkName(path: String) {
            val names = path.split('/')
            val sound = names.all { it.isNotEmpty() && !it.startsWith('.') && '\\' !in it && '\u0000' !in it }
            if (!sound || names.size > 2 || (names.size == 2 && names[0] != "proof") || path == MANIFEST) {
                throw BadInput("$MANIFEST lists a file \"$path\", which no bundle has; do not use this bundle")
            }
        }

        /** [name] with only the characters that adb's shell takes without quotes, and no dot in front. */
        fun safeName(name: String): String =
            name.replace(Regex("[^A-Za-z0-9._-]+"), "-").trim('.', '-').take(60).trimEnd('.', '-').ifEmpty { "model" }

        private fun removeStrangers(part: File, known: Set<String>) {
            part.walkBottomUp().filter { it.isFile && it.relativeTo(part).invariantSeparatorsPath !in known }
                .forEach { it.delete() }
        }
    }
}

/** Copies one file of [size] bytes, or the rest of it. [progress] gets the bytes that are there. */
private class FileCopy(
    private val source: BundleSource,
    private val path: String,
    private val size: Long,
    private val file: File,
    private val cancelled: () -> Boolean,
    private val progress: (Long) -> Unit,
) {
    private val digest = MessageDigest.getInstance("SHA-256")
    private var done = 0L

    fun run(sha256: String) {
        if (file.length() > size) file.delete()
        if (file.length() > 0) file.inputStream().use { input -> each(input) { _, _ -> } }
        if (done < size || size == 0L) fetch()
        val seen = digest.digest().joinToString("") { "%02x".format(it) }
        if (seen != sha256) {
            throw VerificationFailed(
                "$path has the sha256 ${seen.take(12)}…, and the manifest says ${sha256.take(12)}…: it was changed or " +
                    "damaged; get the bundle again from its maker",
            )
        }
    }

    private fun fetch() {
        val opened = source.open(path, done)
        opened.stream.use { input ->
            if (opened.total != null && opened.total != size) throw otherLength(opened.total)
            if (opened.offset == 0L && done > 0) { // the source cannot go on in the middle
                digest.reset()
                done = 0
            }
            FileOutputStream(file, done > 0).use { output ->
                try {
                    each(input) { buffer, count ->
                        if (done > size) throw otherLength(done)
                        output.write(buffer, 0, count)
                    }
                } catch (error: SocketTimeoutException) {
                    throw IOException("the source of $path stalls after ${readable(done)}", error)
                }
                output.fd.sync()
            }
        }
        if (done < size) throw IOException("$path ends after $done of $size bytes")
    }

    private fun otherLength(seen: Long) = VerificationFailed(
        "$path has ${if (seen > size) "more than the" else "$seen bytes, not the"} $size bytes of the manifest: it was " +
            "changed; get the bundle again from its maker",
    )

    private fun each(input: InputStream, write: (ByteArray, Int) -> Unit) {
        val buffer = ByteArray(1 shl 16)
        while (true) {
            if (cancelled()) throw CancellationException("the import was stopped")
            val count = try {
                input.read(buffer)
            } catch (error: IOException) {
                if (cancelled()) throw CancellationException("the import was stopped")
                throw error
            }
            if (count < 0) return
            done += count
            write(buffer, count)
            digest.update(buffer, 0, count)
            progress(done)
        }
    }
}

private fun InputStream.readUpTo(limit: Int, cancelled: () -> Boolean): ByteArray {
    val bytes = ByteArrayOutputStream()
    val buffer = ByteArray(1 shl 14)
    while (bytes.size() < limit) {
        if (cancelled()) throw CancellationException("the import was stopped")
        val count = read(buffer, 0, minOf(buffer.size, limit - bytes.size()))
        if (count < 0) break
        bytes.write(buffer, 0, count)
    }
    return bytes.toByteArray()
}
