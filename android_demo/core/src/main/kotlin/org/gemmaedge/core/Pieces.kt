package org.gemmaedge.core

/**
 * The pieces of a SentencePiece model, read from the bytes of its file.
 *
 * A piece stays a range of these bytes: 262 144 strings would take tens of megabytes. Throws [BadInput] when the bytes
 * are no such model, or one that works in another way than Gemma's.
 */
internal class Pieces(private val model: ByteArray) {
    private val starts: IntArray
    private val ends: IntArray
    private val scores: FloatArray
    private val types: ByteArray
    private val byteIds = IntArray(256) { NONE }
    private val table: IntArray // id + 1 of the pieces that merges can make, by the hash of their bytes
    private val mask: Int

    val size: Int get() = starts.size

    init {
        var count = 0
        var kind = 1L // unigram
        var byteFallback = false
        var keepsText = false
        fields(model, 0, model.size) { number, _, from, to ->
            when (number) {
                1 -> count++
                2 -> fields(model, from, to) { inner, value, _, _ ->
                    if (inner == 3) kind = value
                    if (inner == 35) byteFallback = value != 0L
                }
                3 -> keepsText = keepsText(from, to)
                5 -> fields(model, from, to) { inner, _, a, b -> if (inner == 2 && b > a) throw changesText() }
            }
        }
        if (count == 0) throw unusable("it has no pieces")
        if (kind != BPE) throw unusable("it is of kind $kind, Gemma's is $BPE (BPE)")
        if (!byteFallback) throw unusable("it has no byte fallback, Gemma's has")
        if (!keepsText) throw changesText()
        starts = IntArray(count)
        ends = IntArray(count)
        scores = FloatArray(count)
        types = ByteArray(count) { NORMAL }
        var size = 4
        while (size < 2 * count) size *= 2
        table = IntArray(size)
        mask = size - 1
        readPieces()
        if ((0 until count).count { types[it] == UNKNOWN } != 1) throw unusable("it has not one unknown piece")
        if (byteIds.any { it == NONE }) throw unusable("it lacks a piece for a byte")
    }

    fun type(id: Int): Byte = types[id]

    fun score(id: Int): Float = scores[id]

    fun byteId(byte: Byte): Int = byteIds[byte.toInt() and 0xFF]

    /** The UTF-8 bytes of a piece, in which ▁ is a space. */
    fun bytes(id: Int): ByteArray = model.copyOfRange(starts[id], ends[id])

    fun text(id: Int): String = String(model, starts[id], ends[id] - starts[id], Charsets.UTF_8)

    /** The id of the piece that [text] spells from [from] until [to], or [NONE]. Only pieces that merges can make. */
    fun find(text: ByteArray, from: Int, to: Int): Int {
        var slot = slot(text, from, to)
        while (table[slot] != 0) {
            val id = table[slot] - 1
            if (same(id, text, from, to)) return id
            slot = (slot + 1) and mask
        }
        return NONE
    }

    private fun readPieces() {
        val reserved = HashSet<String>()
        var id = 0
        fields(model, 0, model.size) { number, _, from, to ->
            if (number == 1) read(id++, from, to, reserved)
        }
    }

    private fun read(id: Int, from: Int, to: Int, reserved: MutableSet<String>) {
        fields(model, from, to) { number, value, a, b ->
            when (number) {
                1 -> { starts[id] = a; ends[id] = b }
                2 -> scores[id] = Float.fromBits(value.toInt())
                3 -> types[id] = if (value in NORMAL..BYTE) value.toByte() else 0
            }
        }
        val text = bytes(id)
        if (text.isEmpty() || !isUtf8(text)) throw unusable("piece $id has no text")
        val new = when (types[id]) {
            NORMAL, USER_DEFINED, UNUSED -> insert(id)
            CONTROL, UNKNOWN -> reserved.add(text(id))
            BYTE -> {
                val byte = BYTE_NAME.matchEntire(text(id)) ?: throw unusable("piece $id is no byte")
                byteIds[byte.groupValues[1].toInt(16)] = id
                reserved.add(text(id))
            }
            else -> throw unusable("piece $id is of the type ${types[id]}")
        }
        if (!new) throw unusable("it has the piece ${text(id)} twice")
    }

    private fun insert(id: Int): Boolean {
        var slot = slot(model, starts[id], ends[id])
        while (table[slot] != 0) {
            if (same(table[slot] - 1, model, starts[id], ends[id])) return false
            slot = (slot + 1) and mask
        }
        table[slot] = id + 1
        return true
    }

    private fun slot(text: ByteArray, from: Int, to: Int): Int {
        var hash = 0
        for (at in from until to) hash = hash * 31 + text[at]
        return (hash * -0x61c88647).let { it xor (it ushr 15) } and mask
    }

    private fun same(id: Int, text: ByteArray, from: Int, to: Int): Boolean {
        val start = starts[id]
        if (ends[id] - start != to - from) return false
        for (at in from until to) if (text[at] != model[start + at - from]) return false
        return true
    }

    /** Does the normalizer keep text as it is, but for ▁ in place of a space? Its defaults do not. */
    private fun keepsText(from: Int, to: Int): Boolean {
        var dummyPrefix = true
        var removesSpaces = true
        var escapes = true
        var charsmap = false
        fields(model, from, to) { number, value, a, b ->
            when (number) {
                2 -> charsmap = b > a
                3 -> dummyPrefix = value != 0L
                4 -> removesSpaces = value != 0L
                5 -> escapes = value != 0L
            }
        }
        return escapes && !dummyPrefix && !removesSpaces && !charsmap
    }

    private fun changesText() =
        BadInput("tokenizer.model changes whitespace or characters; Gemma's tokenizer keeps text as it is, use Gemma's")

    companion object {
        const val NONE = -1
        const val NORMAL: Byte = 1
        const val UNKNOWN: Byte = 2
        const val CONTROL: Byte = 3
        const val USER_DEFINED: Byte = 4
        const val UNUSED: Byte = 5
        const val BYTE: Byte = 6
        private const val BPE = 2L
        private val BYTE_NAME = Regex("<0x([0-9A-F]{2})>")
    }
}

private fun unusable(why: String) =
    BadInput("tokenizer.model is not a tokenizer of Gemma: $why; make the bundle again with gemma-edge export")

private fun interface Field {
    fun read(number: Int, value: Long, from: Int, to: Int)
}

/**
 * Reads the fields of a protobuf message in [bytes] from [from] until [to]. [use] gets each field's number, and its
 * value or, of a string or message, where it begins and ends.
 */
private fun fields(bytes: ByteArray, from: Int, to: Int, use: Field) {
    var at = from
    fun varint(): Long {
        var value = 0L
        var shift = 0
        while (at < to && shift < 64) {
            val byte = bytes[at++].toLong()
            value = value or ((byte and 0x7F) shl shift)
            if (byte >= 0) return value
            shift += 7
        }
        throw unusable("it is cut short")
    }
    while (at < to) {
        val tag = varint()
        val wire = (tag and 7).toInt()
        var value = 0L
        val length = when (wire) {
            0 -> 0L.also { value = varint() }
            1 -> 8L
            2 -> varint()
            5 -> 4L
            else -> throw unusable("it is not in the form of a SentencePiece model")
        }
        if (length < 0 || length > to - at) throw unusable("it is cut short")
        val start = at
        at += length.toInt()
        if (wire == 1 || wire == 5) {
            for (index in at - 1 downTo start) value = (value shl 8) or (bytes[index].toLong() and 0xFF)
        }
        use.read((tag ushr 3).toInt(), value, start, at)
    }
}
