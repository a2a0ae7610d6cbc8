package org.gemmaedge.app

import java.awt.image.BufferedImage
import java.awt.image.IndexColorModel
import java.io.ByteArrayOutputStream
import javax.imageio.ImageIO
import org.jetbrains.skia.Bitmap
import org.jetbrains.skia.Image

/** PNGs of at most 256 colors, a third of the size of those of all colors. */
object SmallPng {
    /** The file's bytes, and the number of different colors that [image] had. */
    fun encode(image: Image): Pair<ByteArray, Int> {
        val bitmap = Bitmap.makeFromImage(image)
        val pixels = IntArray(image.width * image.height) { bitmap.getColor(it % image.width, it / image.width) and 0xFFFFFF }
        val counts = pixels.groupBy { it }.mapValues { it.value.size }
        val palette = counts.entries.sortedByDescending { it.value }.map { it.key }.take(256)
        val nearest = counts.keys.associateWith { color -> palette.indices.minBy { distance(palette[it], color) } }
        val model = IndexColorModel(8, palette.size, palette.toIntArray(), 0, false, -1, java.awt.image.DataBuffer.TYPE_BYTE)
        val small = BufferedImage(image.width, image.height, BufferedImage.TYPE_BYTE_INDEXED, model)
        small.raster.setPixels(0, 0, image.width, image.height, IntArray(pixels.size) { nearest.getValue(pixels[it]) })
        return ByteArrayOutputStream().also { ImageIO.write(small, "png", it) }.toByteArray() to counts.size
    }

    private fun distance(one: Int, other: Int): Int = listOf(16, 8, 0).sumOf { shift ->
        val difference = (one shr shift and 255) - (other shr shift and 255)
        difference * difference
    }
}
