package org.gemmaedge.core

import java.awt.image.BufferedImage
import java.io.ByteArrayInputStream
import javax.imageio.ImageIO

/** Decodes PNG, BMP and GIF on the JVM, to the same pixels as Pillow. */
internal object ImageIoDecoder : ImageDecoder {
    override fun decode(bytes: ByteArray): Raster {
        val image = requireNotNull(ImageIO.read(ByteArrayInputStream(bytes))) { "ImageIO cannot read it" }
        val grey = image.raster.numBands <= 2 && image.type != BufferedImage.TYPE_BYTE_INDEXED &&
            image.type != BufferedImage.TYPE_BYTE_BINARY
        val argb = IntArray(image.width * image.height) { index ->
            val (x, y) = Pair(index % image.width, index / image.width)
            if (grey) greyAt(image, x, y) else image.getRGB(x, y)
        }
        return Raster(image.width, image.height, argb)
    }

    /** The sample as it is stored: getRGB would take it for linear light. */
    private fun greyAt(image: BufferedImage, x: Int, y: Int): Int {
        val shift = image.raster.sampleModel.getSampleSize(0) - 8
        val grey = image.raster.getSample(x, y, 0) shr shift
        val alpha = if (image.raster.numBands == 2) image.raster.getSample(x, y, 1) shr shift else 255
        return (alpha shl 24) or (grey * 0x010101)
    }
}
