package org.gemmaedge.core

/**
 * Turns ids into text as they arrive. A character is returned once all its bytes have arrived, and stays as it is.
 *
 * Bytes that are not UTF-8 give U+FFFD, one for each longest beginning of a character, as in Python.
 */
class StreamDecoder internal constructor(private val tokenizer: Tokenizer) {
    private var missing = 0 // bytes of the character that has begun
    private var point = 0
    private var low = FIRST // the next byte of the character is between low and high
    private var high = LAST

    /** The text that [id] completes; empty while a character still lacks bytes. */
    fun push(id: Int): String = buildString { for (byte in tokenizer.bytes(id)) take(byte, this) }

    /** What is left at the end: U+FFFD for a character that is still incomplete, otherwise nothing. */
    fun flush(): String = if (missing == 0) "" else REPLACEMENT.toString().also { missing = 0 }

    private fun take(next: Byte, text: StringBuilder) {
        val byte = next.toInt() and 0xFF
        if (missing > 0 && byte !in low..high) {
            text.append(REPLACEMENT)
            missing = 0
        }
        if (missing > 0) {
            point = (point shl 6) or (byte and 0x3F)
            low = FIRST
            high = LAST
            if (--missing == 0) text.appendCodePoint(point)
            return
        }
        low = if (byte == 0xE0) 0xA0 else if (byte == 0xF0) 0x90 else FIRST // no longer spelling than needed
        high = if (byte == 0xED) 0x9F else if (byte == 0xF4) 0x8F else LAST // no surrogate, nothing over U+10FFFF
        when (byte) {
            in 0x00..0x7F -> text.append(byte.toChar())
            in 0xC2..0xDF -> begin(1, byte and 0x1F)
            in 0xE0..0xEF -> begin(2, byte and 0x0F)
            in 0xF0..0xF4 -> begin(3, byte and 0x07)
            else -> text.append(REPLACEMENT)
        }
    }

    private fun begin(bytes: Int, bits: Int) {
        missing = bytes
        point = bits
    }

    private companion object {
        const val REPLACEMENT = '\uFFFD'
        const val FIRST = 0x80
        const val LAST = 0xBF
    }
}

/** Is [bytes] text in UTF-8? */
internal fun isUtf8(bytes: ByteArray): Boolean =
    bytes.all { it >= 0 } || String(bytes, Charsets.UTF_8).toByteArray().contentEquals(bytes)
