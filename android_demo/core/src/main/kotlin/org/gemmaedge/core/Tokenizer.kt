package org.gemmaedge.core

import java.util.PriorityQueue

/**
 * Gemma's tokenizer, read from the bytes of `tokenizer.model`: SentencePiece BPE with byte fallback.
 *
 * Text never becomes a special token: a user who types `<end_of_turn>` gets the ordinary pieces that spell it. [Chat]
 * puts the real markers in by id. Throws [BadInput] when the bytes are not such a tokenizer.
 */
class Tokenizer(model: ByteArray) {
    private val pieces = Pieces(model)
    private val whole = PrefixTree() // pieces that stay whole in any text
    private val specialNames = PrefixTree()

    /** The special tokens by name: SentencePiece's control pieces, and those that are special in every Gemma 3. */
    val special: Map<String, Int>

    /** One more than the largest id with a name. The model's embedding table may have more rows. */
    val vocabSize: Int get() = pieces.size

    val bosId: Int

    init {
        val found = LinkedHashMap<String, Int>()
        for (id in 0 until pieces.size) {
            when (pieces.type(id)) {
                Pieces.CONTROL, Pieces.UNKNOWN -> found[pieces.text(id).replace(SPACE, ' ')] = id
                Pieces.USER_DEFINED -> whole.add(pieces.bytes(id))
            }
        }
        for (name in SPECIAL) {
            val bytes = name.toByteArray()
            val id = pieces.find(bytes, 0, bytes.size)
            if (id != Pieces.NONE) found[name] = id
        }
        special = found
        special.keys.forEach { specialNames.add(it.toByteArray()) }
        bosId = specialId("<bos>")
        for (name in listOf("<pad>", "<eos>", "<end_of_turn>")) specialId(name)
    }

    private val specialIds = special.values.toHashSet()

    /** The id of a special token. Throws [BadInput] when there is none of that name. */
    fun specialId(name: String): Int = special[name]
        ?: throw BadInput("tokenizer.model has no piece $name; this is not the tokenizer of a Gemma 3 chat model")

    /**
     * The ids of plain [text], after BOS if [bos]. No part of the text becomes a special token.
     *
     * Throws [BadInput] when the text is not valid Unicode (a lone surrogate).
     */
    fun encode(text: String, bos: Boolean): IntArray {
        checkUnicode(text)
        val bytes = text.toByteArray()
        val ids = Ids()
        if (bos) ids += bosId
        var start = 0
        // The text is cut after the first character of each special token's name, so that no part has the whole name.
        for (at in bytes.indices) {
            if (specialNames.longest(bytes, at, bytes.size) > 0) {
                val cut = at + characterLength(bytes[at])
                encodePart(withoutSpaces(bytes, start, cut), ids)
                start = cut
            }
        }
        encodePart(withoutSpaces(bytes, start, bytes.size), ids)
        return ids.toIntArray()
    }

    /** The text of [ids]. Special tokens and ids past the vocabulary give none; what is not UTF-8 gives U+FFFD. */
    fun decode(ids: IntArray): String {
        val decoder = decoder()
        return ids.joinToString("") { decoder.push(it) } + decoder.flush()
    }

    fun decoder(): StreamDecoder = StreamDecoder(this)

    /** The UTF-8 bytes that one id stands for; part of a character for a byte piece, none for a special token. */
    internal fun bytes(id: Int): ByteArray {
        if (id !in 0 until pieces.size || id in specialIds) return NOTHING
        return when (pieces.type(id)) {
            Pieces.UNUSED -> NOTHING
            Pieces.BYTE -> byteArrayOf(pieces.text(id).substring(3, 5).toInt(16).toByte())
            else -> pieces.text(id).replace(SPACE, ' ').toByteArray()
        }
    }

    /**
     * SentencePiece's merges: of all neighbours that make a piece, those with the best score, the leftmost first.
     *
     * A symbol is a range of [text]; it begins as one character or as a piece that stays whole. Merges are kept in a
     * queue, so a text of n bytes takes n log n steps.
     */
    private fun encodePart(text: ByteArray, ids: Ids) {
        val start = IntArray(text.size + 1)
        val stays = BooleanArray(text.size)
        var count = 0
        var at = 0
        while (at < text.size) {
            val length = whole.longest(text, at, text.size)
            stays[count] = length > 0
            start[count++] = at
            at += if (length > 0) length else characterLength(text[at])
        }
        val end = IntArray(count) { if (it + 1 < count) start[it + 1] else text.size }
        val before = IntArray(count) { it - 1 }
        val after = IntArray(count) { if (it + 1 < count) it + 1 else Pieces.NONE }
        val queue = PriorityQueue<Merge>()
        val splits = HashMap<Int, Int>() // of a piece that no text may have: the length of its left part

        fun consider(left: Int, right: Int) {
            if (left < 0 || right < 0 || stays[left] || stays[right]) return
            val id = pieces.find(text, start[left], end[right])
            if (id == Pieces.NONE) return
            queue.add(Merge(left, right, pieces.score(id), start[left], end[right]))
            if (pieces.type(id) == Pieces.UNUSED) splits[id] = end[left] - start[left]
        }

        for (index in 1 until count) consider(index - 1, index)
        while (true) {
            val merge = queue.poll() ?: break
            val left = merge.left
            val right = merge.right
            // Not if one of the two has grown meanwhile, or has been merged into its left neighbour and is empty.
            if (start[left] != merge.start || end[right] != merge.end || start[right] == end[right]) continue
            end[left] = end[right]
            start[right] = end[right]
            after[left] = after[right]
            if (after[left] >= 0) before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        }

        fun emit(from: Int, to: Int) {
            val id = pieces.find(text, from, to)
            val split = if (id != Pieces.NONE && pieces.type(id) == Pieces.UNUSED) splits[id] else null
            when {
                split != null -> { emit(from, from + split); emit(from + split, to) }
                id != Pieces.NONE -> ids += id
                else -> for (index in from until to) ids += pieces.byteId(text[index])
            }
        }

        var symbol = if (count > 0) 0 else Pieces.NONE
        while (symbol >= 0) {
            emit(start[symbol], end[symbol])
            symbol = after[symbol]
        }
    }

    private class Merge(val left: Int, val right: Int, val score: Float, val start: Int, val end: Int) :
        Comparable<Merge> {
        override fun compareTo(other: Merge): Int =
            if (score > other.score) -1 else if (score < other.score) 1 else left.compareTo(other.left)
    }

    companion object {
        const val START_OF_TURN = "<start_of_turn>"
        const val END_OF_TURN = "<end_of_turn>"
        const val START_OF_IMAGE = "<start_of_image>"
        const val END_OF_IMAGE = "<end_of_image>"
        const val IMAGE_SOFT_TOKEN = "<image_soft_token>"

        // These are special in every Gemma 3, whatever the file says about them.
        private val SPECIAL = listOf(
            "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
            START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN,
        )
        private const val SPACE = '▁'
        private val SPACE_BYTES = SPACE.toString().toByteArray()
        private val NOTHING = ByteArray(0)

        private fun characterLength(first: Byte): Int = when (first.toInt() and 0xFF) {
            in 0xF0..0xFF -> 4
            in 0xE0..0xEF -> 3
            in 0xC0..0xDF -> 2
            else -> 1
        }

        private fun withoutSpaces(text: ByteArray, from: Int, to: Int): ByteArray {
            val spaces = (from until to).count { text[it] == ' '.code.toByte() }
            val result = ByteArray(to - from + spaces * (SPACE_BYTES.size - 1))
            var at = 0
            for (index in from until to) {
                if (text[index] == ' '.code.toByte()) {
                    SPACE_BYTES.copyInto(result, at)
                    at += SPACE_BYTES.size
                } else {
                    result[at++] = text[index]
                }
            }
            return result
        }

        private fun checkUnicode(text: String) {
            var at = 0
            while (at < text.length) {
                val isPair = text[at].isHighSurrogate() && at + 1 < text.length && text[at + 1].isLowSurrogate()
                if (text[at].isSurrogate() && !isPair) {
                    val code = text[at].code.toString(16)
                    throw BadInput("the text has a lone surrogate U+${code.uppercase()} at $at; give valid Unicode")
                }
                at += if (isPair) 2 else 1
            }
        }
    }
}

/** Strings, of which it finds the longest that a text has at some place. */
private class PrefixTree {
    private val children = HashMap<Int, Int>() // by the number of the parent and a byte
    private val isEnd = ArrayList<Boolean>().apply { add(false) }

    fun add(bytes: ByteArray) {
        var node = 0
        for (byte in bytes) {
            node = children.getOrPut(key(node, byte)) {
                isEnd.add(false)
                isEnd.size - 1
            }
        }
        isEnd[node] = true
    }

    /** The length of the longest string that is in [text] at [at] and ends before [end]; 0 if there is none. */
    fun longest(text: ByteArray, at: Int, end: Int): Int {
        var node = 0
        var length = 0
        for (index in at until end) {
            node = children[key(node, text[index])] ?: break
            if (isEnd[node]) length = index + 1 - at
        }
        return length
    }

    private fun key(node: Int, byte: Byte): Int = (node shl 8) or (byte.toInt() and 0xFF)
}
