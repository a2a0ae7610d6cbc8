package org.gemmaedge.app

import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.ColorSpace
import android.graphics.Matrix
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.graphics.asImageBitmap
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.ImageDecoder
import org.gemmaedge.core.ImageHeader
import org.gemmaedge.core.Raster

/** Android's picture formats. */
object AndroidPictures : ImageDecoder {
    private const val THUMBNAIL = 256

    override fun decode(bytes: ByteArray): Raster {
        val options = BitmapFactory.Options().apply {
            inPreferredConfig = Bitmap.Config.ARGB_8888
            inPreferredColorSpace = ColorSpace.get(ColorSpace.Named.SRGB)
            inPremultiplied = false
        }
        val bitmap = BitmapFactory.decodeByteArray(bytes, 0, bytes.size, options)
            ?: throw BadInput("Android cannot decode the picture; convert it to PNG or JPEG")
        try {
            val argb = IntArray(bitmap.width * bitmap.height)
            bitmap.getPixels(argb, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
            return Raster(bitmap.width, bitmap.height, argb)
        } finally {
            bitmap.recycle()
        }
    }

    /** A small copy, upright; null for what is no picture. */
    fun thumbnail(bytes: ByteArray): ImageBitmap? {
        val options = BitmapFactory.Options().apply { inJustDecodeBounds = true }
        BitmapFactory.decodeByteArray(bytes, 0, bytes.size, options)
        if (options.outWidth <= 0) return null
        options.inSampleSize = maxOf(1, minOf(options.outWidth, options.outHeight) / THUMBNAIL)
        options.inJustDecodeBounds = false
        val bitmap = BitmapFactory.decodeByteArray(bytes, 0, bytes.size, options) ?: return null
        val turn = upright(ImageHeader.read(bytes)?.orientation ?: 1)
        return Bitmap.createBitmap(bitmap, 0, 0, bitmap.width, bitmap.height, turn, true).asImageBitmap()
    }

    /** What EXIF's [orientation] asks for. */
    private fun upright(orientation: Int) = Matrix().apply {
        when (orientation) {
            3, 4 -> postRotate(180f)
            5, 6 -> postRotate(90f)
            7, 8 -> postRotate(270f)
        }
        if (orientation in setOf(2, 4, 5, 7)) postScale(-1f, 1f)
    }
}
