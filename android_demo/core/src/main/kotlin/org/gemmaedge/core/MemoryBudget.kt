package org.gemmaedge.core

import java.util.Locale

/** Whether a model fits: the bytes [needed] and [available], and both in one [sentence] for the screen. */
class Fit(val needed: Long, val available: Long, val fits: Boolean, val sentence: String)

/** Tells before loading whether a model fits into the phone's memory. */
object MemoryBudget {
    /**
     * [availableBytes] and [lowMemoryThreshold] are the system's (ActivityManager.MemoryInfo's availMem and threshold):
     * below the threshold the system ends other apps, then this one, so only what is above it may be used.
     */
    fun fit(artifact: Artifact, availableBytes: Long, lowMemoryThreshold: Long): Fit {
        val needed = artifact.peakMemoryEstimate
        val available = maxOf(0, availableBytes - lowMemoryThreshold)
        val figures = "${megabytes(needed)} of memory, and this phone has ${megabytes(available)} to spare"
        return if (needed <= available) {
            Fit(needed, available, true, "It fits: the model needs $figures.")
        } else {
            val remedy = "close other apps, or export with a smaller context or fewer bits"
            Fit(needed, available, false, "It does not fit: the model needs $figures; $remedy.")
        }
    }

    private fun megabytes(bytes: Long): String = when {
        bytes >= 10_000_000_000 -> "%.1f GB".format(Locale.ROOT, bytes / 1e9)
        bytes >= 1_000_000_000 -> "%.2f GB".format(Locale.ROOT, bytes / 1e9)
        else -> "%.1f MB".format(Locale.ROOT, bytes / 1e6)
    }
}
