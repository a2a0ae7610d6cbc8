package org.gemmaedge.core

import kotlin.math.floor

/** Pixels [left] until [right] and [top] until [bottom] of an image. */
data class Box(val left: Int, val top: Int, val right: Int, val bottom: Int)

/** Pan & Scan: crops of an image that is far from square (the Gemma 3 report, arXiv 2503.19786, section 2.1). */
object PanAndScan {
    const val MIN_CROP = 256
    private const val MAX_CROPS = 4
    private const val MIN_RATIO = 1.2

    /**
     * Up to 4 boxes along the longer side, in reading order.
     *
     * There are none when the ratio of the sides is under 1.2, or when a side of a crop would be under [minCrop].
     */
    fun boxes(width: Int, height: Int, minCrop: Int = MIN_CROP): List<Box> {
        val long = maxOf(width, height)
        val short = minOf(width, height)
        val ratio = long.toDouble() / short
        if (ratio < MIN_RATIO) return emptyList()
        val count = minOf(floor(ratio + 0.5).toInt(), long / minCrop).coerceIn(2, MAX_CROPS)
        val step = (long + count - 1) / count
        if (minOf(step, short) < minCrop) return emptyList()
        return (0 until long step step).map { start ->
            val end = minOf(start + step, long)
            if (width >= height) Box(start, 0, end, height) else Box(0, start, width, end)
        }
    }
}
