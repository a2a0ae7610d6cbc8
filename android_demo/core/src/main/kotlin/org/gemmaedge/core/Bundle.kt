package org.gemmaedge.core

import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.security.MessageDigest
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.decodeFromJsonElement

/** A bundle that `gemma-edge export` wrote: its folder and its manifest. */
class Bundle(val folder: File, val manifest: Manifest) {
    /** The bundle's tokenizer. Throws [VerificationFailed] when its file is not the manifest's, and as [Tokenizer]. */
    val tokenizer: Tokenizer by lazy {
        val bytes = file(TOKENIZER).readBytes()
        if (hex(sha256().digest(bytes)) != manifest.tokenizer.sha256) throw changed(TOKENIZER)
        Tokenizer(bytes)
    }

    /** The file [name] of the bundle. */
    fun file(name: String): File = File(folder, name)

    /** The exported graph of [format]. Throws [BadInput] when the bundle has none. */
    fun artifact(format: String): Artifact = manifest.artifacts[format]
        ?: throw BadInput("the bundle has no .$format; it has ${manifest.artifacts.keys.joinToString { ".$it" }}")

    companion object {
        const val MANIFEST = "manifest.json"
        const val TOKENIZER = "tokenizer.model"

        /** In bytes. A manifest of 27B has one megabyte. */
        const val LARGEST_MANIFEST = 4 shl 20
        private const val PROOF = "proof"
        private const val MAJOR = "4"
        private const val BUFFER = 1 shl 20
        private const val AGAIN = "copy the bundle again, or make it again with gemma-edge export"
        private val json = Json { ignoreUnknownKeys = true }

        /**
         * Reads the manifest of [folder], and compares names and sizes of all files with it, but not their contents.
         *
         * Throws [BadInput] when there is no manifest of this version, and [VerificationFailed] when a file is missing,
         * is a link, has another size, is outside the folder and its `proof/`, or is not in the manifest.
         */
        fun read(folder: File): Bundle {
            val file = File(folder, MANIFEST)
            if (!isPlain(file)) {
                throw BadInput("${folder.name} has no $MANIFEST; give a folder that gemma-edge export wrote")
            }
            if (file.length() > LARGEST_MANIFEST) {
                throw BadInput("$MANIFEST has ${file.length()} bytes, which is too many; $AGAIN")
            }
            val bytes = try {
                file.readBytes()
            } catch (error: IOException) {
                throw BadInput("$MANIFEST cannot be read (${shown(error.message)}); $AGAIN")
            }
            val manifest = parse(bytes)
            checkFiles(folder, manifest)
            return Bundle(folder, manifest)
        }

        /**
         * Compares the content of all files with the sha256 in the manifest. [progress] gets the bytes read and those
         * of all files; it may throw to end the work.
         *
         * Throws [VerificationFailed] naming the first file that differs.
         */
        fun verify(bundle: Bundle, progress: (done: Long, total: Long) -> Unit = { _, _ -> }) {
            checkFiles(bundle.folder, bundle.manifest)
            val total = bundle.manifest.files.values.sumOf { it.size }
            var done = 0L
            val buffer = ByteArray(BUFFER)
            for ((name, entry) in bundle.manifest.files) {
                val digest = sha256()
                try {
                    bundle.file(name).inputStream().use { stream ->
                        while (true) {
                            val count = stream.read(buffer)
                            if (count < 0) break
                            digest.update(buffer, 0, count)
                            done += count
                            progress(done, total)
                        }
                    }
                } catch (error: IOException) {
                    throw VerificationFailed("${shown(name)} cannot be read (${shown(error.message)}); $AGAIN")
                }
                if (hex(digest.digest()) != entry.sha256) throw changed(name)
            }
        }

        /** The manifest in [bytes], before the files are there. Throws [BadInput] when it is none of this version. */
        fun parse(bytes: ByteArray): Manifest {
            if (!isUtf8(bytes)) throw BadInput("$MANIFEST is not text in UTF-8; $AGAIN")
            return decode(String(bytes, Charsets.UTF_8)).also(::check)
        }

        private fun decode(text: String): Manifest = try {
            checkJson(text)
            val data = json.parseToJsonElement(text) as? JsonObject
                ?: throw BadInput("$MANIFEST holds no object; $AGAIN")
            val version = data["schema_version"] as? JsonPrimitive
            if (version == null || !version.isString || !VERSION.matches(version.content)) {
                throw BadInput("$MANIFEST has the schema_version ${shown(version)}, this app reads $MAJOR.x; $AGAIN")
            }
            json.decodeFromJsonElement(data)
        } catch (error: SerializationException) {
            throw BadInput("$MANIFEST is damaged (${shown(error.message)}); $AGAIN")
        } catch (error: IllegalArgumentException) { // what kotlinx throws for some wrong numbers
            throw BadInput("$MANIFEST is damaged (${shown(error.message)}); $AGAIN")
        }

        private val VERSION = Regex("$MAJOR\\.[0-9]{1,4}")

        private fun check(manifest: Manifest) {
            if (manifest.artifacts.isEmpty()) throw BadInput("$MANIFEST has no artifacts; $AGAIN")
            val opened = manifest.artifacts.values.flatMap { one -> one.files + one.file + one.methods.map { it.file } }
            for (name in opened + TOKENIZER) {
                if (name !in manifest.files) {
                    throw BadInput("$MANIFEST does not list ${shown(name)} among its files; $AGAIN")
                }
            }
            if (manifest.files.getValue(TOKENIZER).sha256 != manifest.tokenizer.sha256) {
                throw BadInput("$MANIFEST has two different sha256 of $TOKENIZER; $AGAIN")
            }
            checkSizes(manifest.files)
            val model = manifest.model
            if (manifest.tokenizer.bosId !in 0 until model.vocabSize) {
                throw BadInput("$MANIFEST has the bos_id ${manifest.tokenizer.bosId} outside the vocabulary; $AGAIN")
            }
            val sizes = linkedMapOf(
                "context" to manifest.context, "chunk" to manifest.chunk, "model.vocab_size" to model.vocabSize,
                "model.hidden_size" to model.hiddenSize, "model.sliding_window" to model.slidingWindow,
            )
            model.vision?.let {
                sizes["model.vision.image_size"] = it.imageSize
                sizes["model.vision.tokens_per_image"] = it.tokensPerImage
                if (it.imageTokenId !in 0 until model.vocabSize) {
                    throw BadInput("$MANIFEST has the image token ${it.imageTokenId} outside the vocabulary; $AGAIN")
                }
            }
            for ((format, artifact) in manifest.artifacts) {
                val cache = artifact.cache
                val place = "artifacts.${shown(format)}.cache"
                if (cache.layers.map { it.kind } != model.layerTypes) {
                    throw BadInput("$MANIFEST: the layers of $place are not those of the model; $AGAIN")
                }
                if (cache.context != manifest.context || cache.chunk != manifest.chunk) {
                    throw BadInput("$MANIFEST: $place has another context or chunk than the manifest; $AGAIN")
                }
                if (cache.dtype !in setOf(CacheLayout.FLOAT32, CacheLayout.INT8)) {
                    throw BadInput("$MANIFEST: $place has the dtype ${shown(cache.dtype)}, which this app does not know")
                }
                cache.layers.forEachIndexed { index, layer ->
                    sizes["$place.layers[$index].slots"] = layer.slots
                    sizes["$place.layers[$index].num_key_value_heads"] = layer.heads
                    sizes["$place.layers[$index].head_dim"] = layer.headDim
                }
            }
            for ((place, size) in sizes) {
                if (size <= 0) throw BadInput("$MANIFEST: $place is $size, expected a positive size; $AGAIN")
            }
        }

        /** Phones' storage does not tell A from a in names, and an import trusts the sum of the sizes. */
        private fun checkSizes(files: Map<String, FileEntry>) {
            var total = 0L
            for ((name, entry) in files) {
                if (entry.size < 0 || entry.size > Long.MAX_VALUE - total) {
                    throw BadInput("$MANIFEST says that ${shown(name)} has ${entry.size} bytes, which cannot be; $AGAIN")
                }
                total += entry.size
            }
            val twice = files.keys.groupBy { it.lowercase() }.values.firstOrNull { it.size > 1 }
            if (twice != null) {
                throw BadInput("$MANIFEST lists ${shown(twice[0])} and ${shown(twice[1])}, one name to a phone; $AGAIN")
            }
        }

        private fun checkFiles(folder: File, manifest: Manifest) {
            for ((name, entry) in manifest.files) {
                val file = File(folder, name)
                if (!isInside(name) || !isPlain(file) || (file.parentFile != folder && !isFolder(file.parentFile!!))) {
                    throw VerificationFailed("${shown(name)} is missing or not a plain file of the bundle; $AGAIN")
                }
                if (file.length() != entry.size) {
                    throw VerificationFailed(
                        "${shown(name)} has ${file.length()} bytes, its manifest says ${entry.size}; $AGAIN",
                    )
                }
            }
            val proof = File(folder, PROOF)
            val known = manifest.files.keys + MANIFEST + if (isFolder(proof)) setOf(PROOF) else emptySet()
            val extra = (children(folder, "") + children(proof, "$PROOF/")).firstOrNull { it !in known }
            if (extra != null) throw VerificationFailed("${shown(extra)} is not in the bundle's manifest; delete it")
        }

        private fun children(folder: File, prefix: String): List<String> =
            folder.list().orEmpty().sorted().map { prefix + it }

        private fun isInside(name: String): Boolean {
            val base = name.substringAfterLast('/')
            return name.substringBeforeLast('/', "").let { it == "" || it == PROOF } && name != "/$base" &&
                base !in setOf("", ".", "..", PROOF) && '\\' !in base && '\u0000' !in base
        }

        private fun isPlain(file: File) = Files.isRegularFile(file.toPath(), NOFOLLOW_LINKS)

        private fun isFolder(file: File) = Files.isDirectory(file.toPath(), NOFOLLOW_LINKS)

        private fun changed(name: String) =
            VerificationFailed("${shown(name)} has another content than its manifest says; $AGAIN")

        /** What a file holds, on one line. */
        private fun shown(value: Any?): String =
            value.toString().take(80).map { if (it.isISOControl()) ' ' else it }.joinToString("")

        private fun sha256() = MessageDigest.getInstance("SHA-256")

        private fun hex(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(it) }
    }
}
