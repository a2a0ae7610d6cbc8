package org.gemmaedge.core

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.channels.FileChannel
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

/** Answers as Python's session did, and demands that it is asked the same, in the same order. */
internal open class RecordedEngine(folder: File, private val manifest: Manifest) : Engine {
    @Serializable
    class Asked(
        val ids: List<Int>? = null,
        val image: Boolean = false,
        val encode: Int? = null,
        val reset: Boolean = false,
    )

    private val asked = Json.decodeFromString<List<Asked>>(File(folder, "calls.json").readText()).iterator()
    private val logits = floats(File(folder, "logits.bin"))
    private val softTokens = floats(File(folder, "soft_tokens.bin"))
    private var answers = 0
    private var encodings = 0
    private var resets = 0

    /** 0 to 3: the walks of the plan; 4: the first one again. */
    val walk get() = resets
    val everythingWasAsked get() = !asked.hasNext()
    var closed = false
    override var position = 0

    override fun feed(call: Call): FloatArray {
        val expected = asked.next()
        val same = expected.image == call is Call.Image && expected.ids!!.size == call.length
        check(same) { "another call at $position" }
        if (call is Call.Text) check(call.ids.asList() == expected.ids) { "other ids at $position" }
        position += call.length
        val vocabulary = manifest.model.vocabSize
        val start = answers++ * vocabulary
        return FloatArray(vocabulary) { logits[start + it] }
    }

    override fun encode(image: Pixels): SoftTokens {
        check(asked.next().encode != null) { "no image is encoded here" }
        val (count, width) = Pair(manifest.model.vision!!.tokensPerImage, manifest.model.hiddenSize)
        val start = encodings++ * count * width
        return SoftTokens(count, width, FloatArray(count * width) { softTokens[start + it] })
    }

    override fun reset() {
        if (position == 0) return
        check(asked.next().reset) { "no reset here" }
        resets++
        position = 0
    }

    override fun rewind(position: Int): Boolean = error("not asked for")

    override fun close() {
        closed = true
    }

    private fun floats(file: File): FloatBuffer = RandomAccessFile(file, "r").use {
        it.channel.map(FileChannel.MapMode.READ_ONLY, 0, it.length()).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
    }
}
