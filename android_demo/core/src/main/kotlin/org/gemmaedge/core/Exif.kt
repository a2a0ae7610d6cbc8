package org.gemmaedge.core

/** What an image file says of itself before anything is decoded. [orientation] is EXIF's, 1 (upright) to 8. */
class ImageHeader(val format: String, val width: Int, val height: Int, val orientation: Int) {
    companion object {
        /**
         * The header of a JPEG, PNG, WebP, BMP or GIF file; null for anything else. The content decides.
         *
         * Throws [IndexOutOfBoundsException] when the file ends inside its header.
         */
        fun read(bytes: ByteArray): ImageHeader? {
            val file = ImageBytes(bytes, 0, bytes.size, littleEndian = false)
            val little = file.ordered(littleEndian = true)
            return when {
                file.has(0, "\u00ff\u00d8\u00ff") -> jpeg(file)
                file.has(0, "\u0089PNG\r\n\u001a\n") -> png(file)
                file.has(0, "RIFF") && file.has(8, "WEBP") -> webp(little)
                file.has(0, "GIF87a") || file.has(0, "GIF89a") -> plain("GIF", little.u16(6), little.u16(8))
                file.has(0, "BM") -> bmp(little)
                else -> null
            }
        }

        private fun plain(format: String, width: Int, height: Int) = ImageHeader(format, width, height, 1)

        private fun jpeg(file: ImageBytes): ImageHeader {
            var at = 2
            var size: Pair<Int, Int>? = null
            val metadata = Metadata()
            while (true) {
                while (file.u8(at) != 0xff) at++
                while (file.u8(at) == 0xff) at++
                val marker = file.u8(at++)
                if (marker in 0xd0..0xd8 || marker <= 1) continue // has no length
                if (marker == START_OF_SCAN || marker == END_OF_IMAGE) break
                val length = file.u16(at)
                if (marker in 0xc0..0xcf && marker !in NOT_FRAMES) size = Pair(file.u16(at + 5), file.u16(at + 3))
                if (marker == APP1) {
                    val data = file.part(at + 2, length - 2)
                    if (data.has(0, Exif.PREFIX)) metadata.exif = metadata.exif ?: data
                    if (data.has(0, JPEG_XMP)) metadata.xmp = data
                }
                at += maxOf(length, 2)
            }
            val (width, height) = size ?: throw IndexOutOfBoundsException("no frame before the scan")
            return ImageHeader("JPEG", width, height, metadata.orientation)
        }

        private fun png(file: ImageBytes): ImageHeader {
            if (!file.has(12, "IHDR")) throw IndexOutOfBoundsException("no IHDR")
            var at = 8
            val metadata = Metadata()
            while (at <= file.size - 12 && !file.has(at + 4, "IEND")) {
                val length = file.i32(at)
                if (length !in 0..file.size - at - 12) break
                val data = file.part(at + 8, length)
                if (file.has(at + 4, "eXIf")) metadata.exif = data
                if (file.has(at + 4, "iTXt") && data.has(0, PNG_XMP)) metadata.xmp = data
                at += length + 12
            }
            return ImageHeader("PNG", file.i32(16), file.i32(20), metadata.orientation)
        }

        private fun webp(file: ImageBytes): ImageHeader = when {
            file.has(12, "VP8 ") -> plain("WebP", file.u16(26) and 0x3fff, file.u16(28) and 0x3fff)
            file.has(12, "VP8L") -> plain("WebP", 1 + (file.i32(21) and 0x3fff), 1 + (file.i32(21) ushr 14 and 0x3fff))
            file.has(12, "VP8X") -> {
                ImageHeader("WebP", 1 + file.u24(24), 1 + file.u24(27), webpMetadata(file).orientation)
            }
            else -> throw IndexOutOfBoundsException("no image")
        }

        /** Of an extended WebP, whose flags say what metadata to look for. */
        private fun webpMetadata(file: ImageBytes): Metadata {
            val metadata = Metadata()
            val flags = file.u8(20)
            var at = 12
            while (at <= file.size - 8) {
                val length = file.i32(at + 4)
                if (length !in 0..file.size - at - 8) break
                val data = file.part(at + 8, length)
                if (flags and WEBP_EXIF != 0 && file.has(at, "EXIF")) metadata.exif = metadata.exif ?: data
                if (flags and WEBP_XMP != 0 && file.has(at, "XMP ")) metadata.xmp = metadata.xmp ?: data
                at += 8 + length + (length and 1)
            }
            return metadata
        }

        private fun bmp(file: ImageBytes): ImageHeader =
            if (file.i32(14) == OS2_HEADER) {
                plain("BMP", file.u16(18), file.u16(20))
            } else {
                plain("BMP", file.i32(18), Math.abs(file.i32(22))) // below zero: its rows go from top to bottom
            }

        private const val APP1 = 0xe1
        private const val START_OF_SCAN = 0xda
        private const val END_OF_IMAGE = 0xd9
        private val NOT_FRAMES = setOf(0xc4, 0xc8, 0xcc)
        private const val WEBP_EXIF = 0x08
        private const val WEBP_XMP = 0x04
        private const val JPEG_XMP = "http://ns.adobe.com/xap/1.0/\u0000"
        private const val PNG_XMP = "XML:com.adobe.xmp\u0000\u0000"
        private const val OS2_HEADER = 12
    }
}

/** Where a file says how it is turned: in EXIF data, or if these do not, in an XMP packet. */
private class Metadata {
    var exif: ImageBytes? = null
    var xmp: ImageBytes? = null

    /** 1 to 8. Metadata is often broken where the image is not, so what cannot be read is 1. */
    val orientation: Int
        get() {
            val inXmp = { xmp?.let { ORIENTATION.find(it.text()) }?.groupValues?.get(1)?.toInt() }
            val found = exif?.let(Exif::orientation) ?: inXmp()
            return found.takeIf { it in 1..8 } ?: 1
        }

    private companion object {
        val ORIENTATION = Regex("""tiff:Orientation(?:="|>)([0-9])""")
    }
}

/** Finds the orientation in EXIF data, which is a small TIFF file. */
internal object Exif {
    const val PREFIX = "Exif\u0000\u0000"
    private const val ORIENTATION = 0x0112
    private const val ENTRY = 12

    /** Null if there is none; 1 for data that are no EXIF. */
    fun orientation(exif: ImageBytes): Int? {
        val start = if (exif.has(0, PREFIX)) PREFIX.length else 0
        val data = exif.part(start, exif.size - start)
        val tiff = data.ordered(littleEndian = data.has(0, "II*\u0000"))
        if (!tiff.has(0, "II*\u0000") && !tiff.has(0, "MM\u0000*")) return if (data.size == 0) null else 1
        try {
            val directory = tiff.i32(4)
            for (number in 0 until tiff.u16(directory)) {
                val entry = tiff.part(directory + 2 + ENTRY * number, ENTRY)
                if (entry.u16(0) == ORIENTATION) return first(entry, tiff)
            }
        } catch (_: IndexOutOfBoundsException) {
            return null
        }
        return null
    }

    /** The first number of an entry. Numbers of up to 4 bytes in all are in the entry itself. */
    private fun first(entry: ImageBytes, tiff: ImageBytes): Int? {
        val width = when (entry.u16(2)) {
            3, 8 -> 2 // SHORT, SSHORT
            4, 9 -> 4 // LONG, SLONG
            else -> return 1
        }
        val length = entry.i32(4).toLong() * width
        if (length <= 0 || entry.size < ENTRY || length > tiff.size) return null
        val numbers = if (length <= 4) entry.part(8, length.toInt()) else tiff.part(entry.i32(8), length.toInt())
        return if (numbers.size < length) null else if (width == 2) numbers.u16(0) else numbers.i32(0)
    }
}

/** [size] bytes of a file from [start]. Nothing outside them can be read: that throws [IndexOutOfBoundsException]. */
internal class ImageBytes(
    private val bytes: ByteArray,
    private val start: Int,
    val size: Int,
    private val littleEndian: Boolean,
) {
    /** The same bytes, with numbers in the given order. */
    fun ordered(littleEndian: Boolean) = ImageBytes(bytes, start, size, littleEndian)

    /** At most [length] bytes from [at]. */
    fun part(at: Int, length: Int): ImageBytes {
        if (at !in 0..size || length < 0) throw IndexOutOfBoundsException("$length bytes at $at of $size")
        return ImageBytes(bytes, start + at, minOf(length, size - at), littleEndian)
    }

    fun u8(at: Int): Int {
        if (at !in 0 until size) throw IndexOutOfBoundsException("cut short after $size bytes")
        return bytes[start + at].toInt() and 0xff
    }

    fun u16(at: Int): Int = number(at, 2)

    fun u24(at: Int): Int = number(at, 3)

    fun i32(at: Int): Int = number(at, 4)

    /** One character for each byte. */
    fun text(): String = String(bytes, start, size, Charsets.ISO_8859_1)

    /** Are the bytes at [at] those of [text], one byte for each character? */
    fun has(at: Int, text: String): Boolean =
        at >= 0 && at <= size - text.length && text.indices.all { u8(at + it) == text[it].code }

    private fun number(at: Int, length: Int): Int = (0 until length).fold(0) { sum, index ->
        (sum shl 8) or u8(if (littleEndian) at + length - 1 - index else at + index)
    }
}
