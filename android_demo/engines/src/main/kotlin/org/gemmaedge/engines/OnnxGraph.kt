package org.gemmaedge.engines

/**
 * The .onnx [model] with its graph's initializer [name] taken out, or null if it has none of that name.
 *
 * A graph input that has an initializer of its own name is optional: that is its default. ONNX Runtime's Java
 * classes refuse a value for an optional input ("Unknown input name"), though its C and Python interfaces take one.
 * Without the default the input is an ordinary one. The weights are in another file, so the model is small.
 *
 * Field numbers are those of onnx.proto: ModelProto.graph 7, GraphProto.initializer 5, TensorProto.name 8.
 */
internal fun withoutInitializer(model: ByteArray, name: String): ByteArray? {
    val graph = fields(model, 0, model.size).firstOrNull { it.number == 7 } ?: return null
    val initializer = fields(model, graph.content, graph.end).firstOrNull { field ->
        field.number == 5 && fields(model, field.content, field.end).any {
            it.number == 8 && String(model, it.content, it.end - it.content, Charsets.UTF_8) == name
        }
    } ?: return null
    val length = varint(graph.end - graph.content - (initializer.end - initializer.start))
    val header = byteArrayOf((7 shl 3 or LENGTH_DELIMITED).toByte()) + length
    return model.copyOfRange(0, graph.start) + header +
        model.copyOfRange(graph.content, initializer.start) + model.copyOfRange(initializer.end, model.size)
}

/** A field of a protobuf message: its tag begins at [start], its content at [content]; both end before [end]. */
private class Field(val number: Int, val start: Int, val content: Int, val end: Int)

/** The fields of the message in [bytes] from [from] to [to]. Stops at the first byte that makes no sense. */
private fun fields(bytes: ByteArray, from: Int, to: Int): Sequence<Field> = sequence {
    var at = from
    fun varint(): Long {
        var value = 0L
        var shift = 0
        while (at < to && shift < Long.SIZE_BITS) {
            val byte = bytes[at++].toInt()
            value = value or ((byte and 0x7F).toLong() shl shift)
            if (byte >= 0) return value
            shift += 7
        }
        return -1
    }
    while (at < to) {
        val start = at
        val tag = varint()
        val length = when ((tag and 7).toInt()) {
            0 -> if (varint() == -1L && at >= to) return@sequence else 0
            1 -> 8
            LENGTH_DELIMITED -> varint()
            5 -> 4
            else -> return@sequence
        }
        if (tag < 0 || length < 0 || length > to - at) return@sequence
        val content = at
        at += length.toInt()
        yield(Field((tag shr 3).toInt(), start, content, at))
    }
}

private fun varint(value: Int): ByteArray {
    val bytes = ArrayList<Byte>()
    var rest = value
    while (rest >= 0x80) {
        bytes.add((rest and 0x7F or 0x80).toByte())
        rest = rest ushr 7
    }
    bytes.add(rest.toByte())
    return bytes.toByteArray()
}

private const val LENGTH_DELIMITED = 2
