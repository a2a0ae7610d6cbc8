package org.gemmaedge.core

import java.io.File
import java.nio.file.Files
import java.security.MessageDigest

/**
 * A toy model, the same as `Toy` in android_demo/ci/vectors/text.py: its logits depend on everything that was fed.
 *
 * It can go back by at most [rewindable] ids, and refuses calls that a real engine must never get.
 */
class FakeEngine(
    private val manifest: Manifest, private val rewindable: Int = 0, private val whenFed: (FakeEngine) -> Unit = {},
) : Engine {
    private val states = ArrayList<Long>().apply { add(1L) } // after each id
    val fed = ArrayList<Int>()
    val calls = ArrayList<Int>()
    var resets = 0
    var encoded = 0
    var isClosed = false

    override val position: Int get() = fed.size

    /** Equal for two engines that were fed the same. */
    val state: Long get() = states.last()

    override fun feed(call: Call): FloatArray {
        check(!isClosed)
        val vision = manifest.model.vision
        check(call.length in 1..manifest.chunk) { "${call.length} ids in a call" }
        check(position + call.length <= manifest.context) { "over the context" }
        when (call) {
            is Call.Text -> for (id in call.ids) {
                check(id in 0 until manifest.model.vocabSize && id != vision?.imageTokenId) { "id $id in a text" }
                add(id, id.toLong())
            }
            is Call.Image -> {
                check(call.softTokens.count == vision!!.tokensPerImage)
                for (value in call.softTokens.values) add(vision.imageTokenId, value.toLong())
            }
        }
        calls += call.length
        try {
            whenFed(this)
        } catch (error: IllegalStateException) { // what the call has written into the caches nobody knows
            cut(position - call.length)
            states[position] = 0
            throw error
        }
        return logits(manifest.model.vocabSize, state, 10).also { if (state ushr 59 == 0L) it[6] = 100f }
    }

    override fun encode(image: Pixels): SoftTokens {
        encoded++
        val sum = image.rgb.sumOf { it.toInt() and 0xFF }.toFloat()
        val count = manifest.model.vision!!.tokensPerImage
        return SoftTokens(count, 1, FloatArray(count) { sum })
    }

    override fun reset() {
        resets++
        cut(0)
        states[0] = 1L
    }

    override fun rewind(position: Int): Boolean {
        check(position in 0..this.position)
        if (this.position - position > rewindable) return false
        cut(position)
        return true
    }

    override fun close() {
        isClosed = true
    }

    private fun add(id: Int, number: Long) {
        fed += id
        states += states.last() * 6364136223846793005L + number + 1442695040888963407L
    }

    private fun cut(count: Int) {
        fed.subList(count, fed.size).clear()
        states.subList(count + 1, states.size).clear()
    }

    companion object {
        /** Numbers from 0 until 16 in steps of 16 / 2^[bits]. */
        fun logits(size: Int, state: Long, bits: Int): FloatArray = FloatArray(size) { index ->
            val mixed = (state xor (index * -0x61c8864680b583ebL)) * -0x40a7b892e31b1a47L
            ((mixed ushr (64 - bits)).toDouble() * 16 / (1L shl bits)).toFloat()
        }
    }
}

/** A bundle of the demo's tokenizer with caches for [context] positions. Its artifact is empty. */
internal fun demoBundle(
    seeing: Boolean = false, context: Int = 400, chunk: Int = 16, chatFormat: String = "gemma",
): Bundle {
    val bytes = TextVectors.file("demo.model").readBytes()
    val tokenizer = Tokenizer(bytes)
    fun id(name: String) = tokenizer.specialId(name)
    val vision = Vision(8, 4, id("<image_soft_token>"), id("<start_of_image>"), id("<end_of_image>"))
    val model = Model(tokenizer.vocabSize, 8, listOf("full_attention"), 64, if (seeing) vision else null)
    val info = TokenizerInfo(sha256(bytes), 2, listOf(1, 6), emptyMap(), chatFormat)
    val cache = CacheLayout("ring", context, chunk, listOf(LayerCache("full_attention", context, 1, 8)))
    val onnx = Artifact("model.onnx", listOf("model.onnx"), cache, emptyList(), emptyList(), emptyMap(), 0, 0)
    val manifest = Manifest("4.0", model, "recipe", "rtn", context, chunk, info, mapOf("onnx" to onnx), emptyMap())
    return Bundle(demoFolder, manifest)
}

private val demoFolder: File by lazy {
    val folder = Files.createTempDirectory("bundle").toFile()
    val tokenizer = File(folder, "tokenizer.model")
    TextVectors.file("demo.model").copyTo(tokenizer)
    listOf(folder, tokenizer).forEach { it.deleteOnExit() }
    folder
}

internal fun sha256(bytes: ByteArray): String =
    MessageDigest.getInstance("SHA-256").digest(bytes).joinToString("") { "%02x".format(it) }
