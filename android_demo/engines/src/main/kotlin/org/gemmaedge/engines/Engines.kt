package org.gemmaedge.engines

import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Engine
import org.gemmaedge.core.EngineFactory
import org.gemmaedge.core.Pixels

/** Opens a bundle's graph in the runtime of its format. */
object Engines : EngineFactory {
    override fun open(bundle: Bundle, format: String, threads: Int?): Engine = when (format) {
        "onnx" -> OnnxEngine(bundle, threads)
        "pte" -> ExecuTorchEngine(bundle, threads)
        else -> throw BadInput("this app runs .onnx and .pte, not .$format; choose one of the two")
    }
}

/** The first line of a runtime's message, which may have many. */
internal fun reason(error: Throwable): String =
    error.message?.lineSequence()?.firstOrNull { it.isNotBlank() }?.trim() ?: error.javaClass.simpleName

// What to do about a file.
internal const val ANOTHER_FILE = "the file is not the one of this bundle, push it again"
internal const val DAMAGED = "export the bundle again or push it again"
internal const val CHECK_IT = "check the bundle with the self-check"

internal fun longs(count: Int): LongBuffer = direct(count, Long.SIZE_BYTES).asLongBuffer()

internal fun floats(count: Int): FloatBuffer = direct(count, Float.SIZE_BYTES).asFloatBuffer()

private fun direct(count: Int, bytes: Int): ByteBuffer =
    ByteBuffer.allocateDirect(Math.multiplyExact(count, bytes)).order(ByteOrder.nativeOrder())

/**
 * This buffer, to be read from its start until [end].
 *
 * Through [Buffer], because before API 29 Android's LongBuffer and FloatBuffer have no such methods of their own.
 */
internal fun <B : Buffer> B.readable(end: Int = capacity()): B = apply {
    clear()
    limit(end)
}

/** The ids in a buffer that native code reads in place. */
internal fun idsBuffer(ids: IntArray): LongBuffer =
    longs(ids.size).apply { for (id in ids) put(id.toLong()) }.readable()

/** The image as the vision model takes it: channel by channel, in 0 … 1. */
internal fun pixelsBuffer(image: Pixels): FloatBuffer = floats(image.rgb.size).apply {
    for (channel in 0 until Pixels.CHANNELS) {
        for (index in channel until image.rgb.size step Pixels.CHANNELS) {
            put((image.rgb[index].toInt() and 0xFF) / 255f)
        }
    }
}.readable()
