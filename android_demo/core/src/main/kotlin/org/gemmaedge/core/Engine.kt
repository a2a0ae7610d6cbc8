package org.gemmaedge.core

/** An image as the vision model takes it: RGB, row by row, three bytes a pixel, [size] × [size] pixels. */
class Pixels(val size: Int, val rgb: ByteArray) {
    init {
        require(rgb.size == size * size * CHANNELS) { "${rgb.size} bytes for $size × $size pixels" }
    }

    companion object {
        const val CHANNELS = 3
    }
}

/** What the vision model makes of one image: [count] rows of [width] numbers, row by row. */
class SoftTokens(val count: Int, val width: Int, val values: FloatArray) {
    init {
        require(values.size == count * width) { "${values.size} numbers for $count × $width" }
    }
}

/** What one call of a graph takes: at most a chunk of text, or the soft tokens of one image. */
sealed interface Call {
    val length: Int

    class Text(val ids: IntArray) : Call {
        override val length get() = ids.size
    }

    class Image(val softTokens: SoftTokens) : Call {
        override val length get() = softTokens.count
    }
}

/**
 * One exported graph of a bundle, opened, with the KV cache of one sequence.
 *
 * The loop above it ([Generation], [Conversation], [SelfCheck]) does not know which runtime runs. An engine checks
 * nothing: ids, lengths and the context are checked before a call. It belongs to one thread at a time.
 */
interface Engine : AutoCloseable {
    /** The number of ids fed since the last reset. */
    val position: Int

    /**
     * Feeds one call at [position]. Returns the logits after its last id, one for each row of the vocabulary.
     *
     * The array is the caller's own: the next call does not change it.
     */
    fun feed(call: Call): FloatArray

    /** The soft tokens of an image. The vision model is in memory only while it runs, or until the next [feed]. */
    fun encode(image: Pixels): SoftTokens

    /** Goes back to position 0. The next sequence gets the logits that a new engine would give. */
    fun reset()

    /**
     * Goes back to [position], if the bounded caches still hold all that the next position sees.
     *
     * Returns false, and changes nothing, if they do not: then the sequence must be fed again from the start.
     */
    fun rewind(position: Int): Boolean
}

/** Opens a graph of a bundle in its runtime. */
fun interface EngineFactory {
    /**
     * Opens the graph of [format] ("onnx" or "pte") of [bundle] with [threads] threads (null: the runtime's choice).
     *
     * Throws [BadInput] when the runtime does not load the file, or when its methods are not those of the manifest.
     */
    fun open(bundle: Bundle, format: String, threads: Int?): Engine
}
