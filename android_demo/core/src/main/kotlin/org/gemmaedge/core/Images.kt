package org.gemmaedge.core

import kotlin.math.abs
import kotlin.math.ceil

/** A decoded image, row by row: alpha, red, green and blue in each number, not premultiplied, not yet upright. */
class Raster(val width: Int, val height: Int, val argb: IntArray) {
    init {
        require(width > 0 && height > 0 && argb.size == width * height) { "${argb.size} for $width × $height pixels" }
    }
}

/**
 * Decodes an image file on this platform. An animation gives its first frame.
 *
 * It must not apply the EXIF orientation: [Images.prepare] does. May throw anything for damaged data. The platforms'
 * JPEG decoders differ from one another in the last bits; those of PNG, BMP and GIF do not.
 */
fun interface ImageDecoder {
    fun decode(bytes: ByteArray): Raster
}

/** An image, prepared: the pixels of the whole image, then those of its Pan & Scan crops. */
class Picture(val pixels: List<Pixels>)

/** From image files to what the vision model takes: of equal decoded pixels, the same bytes as gemma3/images.py. */
object Images {
    const val READABLE = "JPEG, PNG, WebP, BMP or GIF"

    /** Decoding 8192 × 8192 pixels takes 0.3 GB or more. 65,535 is the longest side of a JPEG. */
    const val MAX_PIXELS = 1 shl 26
    const val MAX_SIDE = 65_535
    const val MAX_BYTES = 1 shl 29

    /**
     * The image of a file, upright, on white, resized to [size] × [size]; with [panAndScan] its crops too.
     *
     * Its size is checked in its header before [decoder] sees it. Throws [BadInput] when it is no image, damaged or too
     * large, and [DoesNotFit] when decoding it takes more memory than there is.
     */
    fun prepare(bytes: ByteArray, decoder: ImageDecoder, size: Int, panAndScan: Boolean): Picture {
        val header = checkedHeader(bytes)
        val raster = try {
            decoder.decode(bytes)
        } catch (_: OutOfMemoryError) {
            throw DoesNotFit(
                "the picture of ${header.width} × ${header.height} pixels takes more memory than this app has left; " +
                    "make it smaller",
            )
        } catch (error: Exception) {
            throw damaged(error.message ?: error.javaClass.simpleName)
        }
        checkSize(raster.width, raster.height) // a frame of a GIF may be larger than its header says
        if (header.format != "GIF" && (raster.width != header.width || raster.height != header.height)) {
            val said = "its header says ${header.width} × ${header.height}"
            throw damaged("${raster.width} × ${raster.height} pixels, $said")
        }
        return prepare(View.upright(raster, header.orientation), size, panAndScan)
    }

    /** As above, for an image that is upright already. */
    fun prepare(raster: Raster, size: Int, panAndScan: Boolean): Picture =
        prepare(View.upright(raster, 1), size, panAndScan)

    private fun prepare(view: View, size: Int, panAndScan: Boolean): Picture {
        // Crops are cut out before they are resized, so that a neighbouring crop's pixels do not bleed in.
        val boxes = if (panAndScan) PanAndScan.boxes(view.width, view.height) else emptyList()
        return Picture(listOf(Resize.square(view, size)) + boxes.map { Resize.square(view.cut(it), size) })
    }

    private fun checkedHeader(bytes: ByteArray): ImageHeader {
        if (bytes.size > MAX_BYTES) {
            throw BadInput("the picture has ${bytes.size} bytes, over the limit of $MAX_BYTES; make it smaller")
        }
        val header = try {
            ImageHeader.read(bytes)
        } catch (error: IndexOutOfBoundsException) {
            throw damaged(error.message ?: "its header is cut short")
        }
        header ?: throw BadInput("the picture begins with ${start(bytes)}, not an image in $READABLE; convert it")
        checkSize(header.width, header.height)
        return header
    }

    private fun checkSize(width: Int, height: Int) {
        if (width <= 0 || height <= 0) throw damaged("$width × $height pixels")
        if (width.toLong() * height > MAX_PIXELS) {
            throw BadInput("the picture has $width × $height pixels, over the limit of $MAX_PIXELS; make it smaller")
        }
        if (maxOf(width, height) > MAX_SIDE) {
            throw BadInput("the picture has $width × $height pixels, a side over $MAX_SIDE; cut it")
        }
    }

    private fun damaged(reason: String): BadInput {
        val line = reason.split(Regex("\\s+")).joinToString(" ").take(100)
        return BadInput("the picture is damaged or cut short ($line); get it again")
    }

    private fun start(bytes: ByteArray): String =
        if (bytes.isEmpty()) "nothing" else bytes.take(12).joinToString(" ") { "%02x".format(it.toInt() and 0xff) }
}

/**
 * A rectangle of a [raster] as it is seen upright, without a copy.
 *
 * Pixel (x, y) is number [origin] + x · [right] + y · [down] of the raster.
 */
internal class View(
    private val raster: Raster,
    val width: Int,
    val height: Int,
    private val origin: Int,
    private val right: Int,
    private val down: Int,
) {
    fun cut(box: Box): View {
        val corner = origin + box.left * right + box.top * down
        return View(raster, box.right - box.left, box.bottom - box.top, corner, right, down)
    }

    /** Writes the red, green and blue of row [y] into [into], with transparent parts on white. */
    fun row(y: Int, into: IntArray) {
        var from = origin + y * down
        for (at in 0 until 3 * width step 3) {
            val pixel = raster.argb[from]
            val alpha = pixel ushr 24
            val red = pixel shr 16 and 0xff
            val green = pixel shr 8 and 0xff
            val blue = pixel and 0xff
            into[at] = if (alpha == 255) red else onWhite(red, alpha)
            into[at + 1] = if (alpha == 255) green else onWhite(green, alpha)
            into[at + 2] = if (alpha == 255) blue else onWhite(blue, alpha)
            from += right
        }
    }

    /** A channel over opaque white, rounded as Pillow's alpha_composite rounds: 7 bits more, and /255 by shifts. */
    private fun onWhite(value: Int, alpha: Int): Int {
        if (alpha == 0) return 255
        val share = alpha shl 7 // of 255 << 7, because the result is opaque
        val sum = value * share + 255 * ((255 shl 7) - share) + (0x80 shl 7)
        return ((sum shr 8) + sum shr 8) shr 7
    }

    companion object {
        /** [raster] turned and mirrored as EXIF's [orientation] says. */
        fun upright(raster: Raster, orientation: Int): View {
            val (w, h) = Pair(raster.width, raster.height)
            val last = w * h - 1
            return when (orientation) {
                2 -> View(raster, w, h, w - 1, -1, w)
                3 -> View(raster, w, h, last, -1, -w)
                4 -> View(raster, w, h, last - (w - 1), 1, -w)
                5 -> View(raster, h, w, 0, w, 1)
                6 -> View(raster, h, w, last - (w - 1), -w, 1)
                7 -> View(raster, h, w, last, -w, -1)
                8 -> View(raster, h, w, w - 1, w, -1)
                else -> View(raster, w, h, 0, 1, w)
            }
        }
    }
}

/**
 * Antialiased bilinear resizing, to the bit as Pillow 13 does it for 8-bit images.
 *
 * Two passes with weights of [BITS] bits, each rounded to a byte: across every row, then along the columns; in the
 * other order when the height shrinks by over twice as many pixels as the width. (Pillow before 13 has another rule for
 * the order, so there tall images differ in the last bit.) Rows are read when the columns come to them, so that only
 * those under one filter are in memory.
 */
internal object Resize {
    private const val BITS = 22
    private const val HALF = 1 shl (BITS - 1)

    fun square(view: View, size: Int): Pixels {
        val across = Weights(view.width, size)
        val along = Weights(view.height, size)
        val acrossFirst = view.height <= size || view.height - size <= 2 * (view.width - size)
        val width = if (acrossFirst) size else view.width
        val line = IntArray(3 * view.width)
        val rows = Array(along.most) { IntArray(3 * width) } // row y is at y mod most
        val sums = IntArray(3 * width)
        val small = if (acrossFirst) sums else IntArray(3 * size)
        val rgb = ByteArray(3 * size * size)
        var made = 0
        for (y in 0 until size) {
            val first = along.first[y]
            while (made < first + along.count[y]) {
                val row = rows[made % rows.size]
                view.row(made++, if (acrossFirst) line else row)
                if (acrossFirst) across.narrow(line, row)
            }
            sums.fill(HALF)
            for (index in 0 until along.count[y]) {
                val row = rows[(first + index) % rows.size]
                val weight = along.values[y * along.most + index]
                for (at in sums.indices) sums[at] += row[at] * weight
            }
            for (at in sums.indices) sums[at] = byteOf(sums[at])
            if (!acrossFirst) across.narrow(sums, small)
            for (at in small.indices) rgb[y * small.size + at] = small[at].toByte()
        }
        return Pixels(size, rgb)
    }

    private fun byteOf(sum: Int): Int = (sum shr BITS).coerceIn(0, 255)

    /** For each of [size] results, the [first] of the [length] values that it is made of, their [count] and weights. */
    private class Weights(length: Int, private val size: Int) {
        private val scale = length.toDouble() / size
        private val support = maxOf(scale, 1.0)
        val most = ceil(support).toInt() * 2 + 1
        val first = IntArray(size)
        val count = IntArray(size)
        val values = IntArray(size * most)

        init {
            val share = DoubleArray(most)
            for (result in 0 until size) {
                val center = (result + 0.5) * scale
                first[result] = maxOf(0, (center - support + 0.5).toInt())
                count[result] = minOf(length, (center + support + 0.5).toInt()) - first[result]
                var sum = 0.0
                for (index in 0 until count[result]) {
                    val distance = abs((index + first[result] - center + 0.5) * (1.0 / support))
                    share[index] = if (distance < 1.0) 1.0 - distance else 0.0
                    sum += share[index]
                }
                for (index in 0 until count[result]) {
                    val part = if (sum != 0.0) share[index] / sum else share[index]
                    values[result * most + index] = (0.5 + part * (1 shl BITS)).toInt()
                }
            }
        }

        /** Makes [size] pixels [into] of a whole [line] of pixels. */
        fun narrow(line: IntArray, into: IntArray) {
            for (result in 0 until size) {
                var red = HALF
                var green = HALF
                var blue = HALF
                var from = 3 * first[result]
                val start = result * most
                for (index in start until start + count[result]) {
                    val weight = values[index]
                    red += line[from] * weight
                    green += line[from + 1] * weight
                    blue += line[from + 2] * weight
                    from += 3
                }
                into[3 * result] = byteOf(red)
                into[3 * result + 1] = byteOf(green)
                into[3 * result + 2] = byteOf(blue)
            }
        }
    }
}
