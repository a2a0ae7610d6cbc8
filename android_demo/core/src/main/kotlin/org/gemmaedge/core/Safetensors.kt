package org.gemmaedge.core

import java.io.File
import java.io.RandomAccessFile
import java.nio.Buffer
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.decodeFromJsonElement

/** One array of a safetensors file: [bytes] in the mapped file, little-endian. */
class StoredArray(val dtype: String, val shape: List<Int>, val bytes: ByteBuffer)

/** Reads a safetensors file. Its arrays stay in the file, which is memory-mapped: only what is looked at is read. */
object Safetensors {
    private const val MOST_HEADER = 1 shl 20
    private val BYTES = mapOf("F32" to 4, "I32" to 4, "U8" to 1)

    @Serializable
    private class Entry(
        val dtype: String,
        val shape: List<Int>,
        @SerialName("data_offsets") val offsets: List<Int>,
    )

    /** The arrays by name. Throws [IllegalArgumentException] for a file that is not exactly as the format demands. */
    fun read(file: File): Map<String, StoredArray> {
        val data = RandomAccessFile(file, "r").use { opened ->
            require(opened.length() in 8..Int.MAX_VALUE) { "${opened.length()} bytes" }
            opened.channel.map(FileChannel.MapMode.READ_ONLY, 0, opened.length()).order(ByteOrder.LITTLE_ENDIAN)
        }
        val length = data.getLong(0)
        require(length in 2..MOST_HEADER && length <= data.limit() - 8) { "a header of $length bytes" }
        val header = ByteArray(length.toInt())
        data.part(8, 8 + length.toInt()).get(header)
        val body = data.part(8 + length.toInt(), data.limit())
        val entries = try {
            val json = Json.parseToJsonElement(header.decodeToString(throwOnInvalidSequence = true)) as? JsonObject
            requireNotNull(json) { "its header is no JSON object" }
            (json - "__metadata__").mapValues { (_, entry) -> Json.decodeFromJsonElement<Entry>(entry) }
        } catch (error: SerializationException) {
            throw IllegalArgumentException("its header: ${error.message}")
        } catch (_: CharacterCodingException) {
            throw IllegalArgumentException("its header is not UTF-8 text")
        } catch (_: StackOverflowError) {
            throw IllegalArgumentException("its header: lists in lists without end")
        }
        var end = 0
        for ((name, entry) in entries.entries.sortedBy { it.value.offsets.firstOrNull() ?: 0 }) {
            val size = requireNotNull(BYTES[entry.dtype]) { "$name is ${entry.dtype}" }
            require(entry.shape.all { it >= 0 }) { "$name has the shape ${entry.shape}" }
            val bytes = entry.shape.fold(size.toLong()) { product, side -> Math.multiplyExact(product, side.toLong()) }
            require(entry.offsets.size == 2 && entry.offsets[0] == end && entry.offsets[1] - end.toLong() == bytes) {
                "$name of the shape ${entry.shape} is at ${entry.offsets}"
            }
            end = entry.offsets[1]
        }
        require(end == body.limit()) { "$end bytes of arrays, ${body.limit()} in the file" }
        return entries.mapValues { (_, entry) ->
            StoredArray(entry.dtype, entry.shape, body.part(entry.offsets[0], entry.offsets[1]))
        }
    }

    /** Through [Buffer], because before API 28 Android's ByteBuffer has no such methods of its own. */
    private fun ByteBuffer.part(start: Int, end: Int): ByteBuffer {
        val copy = duplicate()
        (copy as Buffer).limit(end)
        (copy as Buffer).position(start)
        return copy.slice().order(ByteOrder.LITTLE_ENDIAN)
    }
}
