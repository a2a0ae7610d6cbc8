package org.gemmaedge.core

/**
 * The walks, landmarks and images that a plan for a model must have: a shorter plan would be a weaker proof.
 *
 * The same rules as runtime_py/proof/plan.py. They depend only on the manifest; the ids are in the golden vectors too.
 */
internal class PlanShape private constructor(
    private val manifest: Manifest,
    longer: Boolean,
) {
    private val window = manifest.model.slidingWindow
    private val chunk = manifest.chunk
    private val vision = manifest.model.vision
    private val softTokens = vision?.tokensPerImage ?: 0
    private val wraps = manifest.artifacts.values.map { localSlots(it.cache) }.distinct().sorted()
    private val least = sequence(1, 2, 2)
    private val most = sequence(MOST_WINDOWS, MOST_TURNS, MOST_IMAGES)
    private val length =
        minOf(manifest.context, if (longer) most else maxOf(least, minOf(most, STEP_EVERYTHING)))
    private val places = if (vision == null) emptyList() else imagePlaces()
    private val landmarks = landmarks()

    fun isThatOf(plan: Plan): Boolean = plan.ids.size == length &&
        plan.imagePlaces == places &&
        plan.imageNumbers == places.indices.map { ORDER[it % ORDER.size] } &&
        plan.landmarks == landmarks &&
        plan.walks == walks() &&
        plan.walks.keys.first() == ODD_SIZES // which order says what is fed first

    private fun sequence(windows: Int, turns: Int, images: Int) =
        maxOf(wraps.last() + windows * window, turns * wraps.last() + NEAR) + images * softTokens

    private fun localSlots(layout: CacheLayout): Int =
        layout.layers.filter { it.kind == SLIDING }.minOfOrNull { it.slots } ?: layout.context

    private fun imagePlaces(): List<Int> {
        val found = mutableListOf<Int>()
        fun place(start: Int) {
            val from = maxOf(start, found.lastOrNull()?.let { it + softTokens + 2 } ?: 2)
            if (from + softTokens + 1 + TAIL <= length) found += from
        }
        place(2)
        val middle = length / 2
        for (position in (listOf(chunk, window) + wraps).filter { it < middle }.sorted()) {
            if (found.none { position in it until it + softTokens }) place(position - softTokens / 2)
        }
        place(middle)
        place(middle)
        place(length - softTokens - 1 - 2 * TAIL)
        return found
    }

    private fun landmarks(): Map<String, Int> {
        val found = mutableMapOf("first" to 0, "chunk-end" to chunk - 1)
        found += mapOf("W-1" to window - 1, "W" to window, "W+1" to window + 1)
        for (count in 2..MOST_WINDOWS) found["${count}W"] = count * window
        for (slots in wraps) for (turn in 1..MOST_TURNS) found["wrap-$turn-of-$slots-slots"] = turn * slots
        found["last"] = length - 1
        places.forEachIndexed { number, place -> found["image-${number + 1}"] = place + softTokens - 1 }
        return found.filterValues { it < length }
    }

    private fun walks(): Map<String, List<Int>> {
        val odd = listOf(1, 2, 3, 5, 7, 11, 13, 1, chunk, maxOf(1, chunk - 1), chunk + 1, 2 * chunk + 3)
        val stepped = (0 until length).filter { position ->
            length <= STEP_EVERYTHING || landmarks.values.any { Math.abs(it - position) <= NEAR }
        }
        val tail = minOf(TAIL, length - 1)
        return mapOf(
            ODD_SIZES to ends { odd[it % odd.size] },
            ONE_BY_ONE to (stepped.map { it + 1 } + length).toSet(),
            "chunks" to ends { chunk },
            "whole-prompt" to (length - tail..length).toSet(),
        ).mapValues { (_, cuts) -> imagesWhole(cuts) }
    }

    /** The ends of calls of the sizes [sizeOf] 0, 1, 2, …, the last one shortened. */
    private fun ends(sizeOf: (Int) -> Int): Set<Int> {
        val found = linkedSetOf(0)
        var index = 0
        while (found.last() < length) found += minOf(length, found.last() + sizeOf(index++))
        return found
    }

    /** The lengths between [cuts], of which one inside an image moves to the image's end. */
    private fun imagesWhole(cuts: Set<Int>): List<Int> {
        val moved = cuts.map { cut ->
            val inside = places.firstOrNull { cut in it + 1 until it + softTokens }
            if (inside == null) cut else inside + softTokens
        }
        return (moved + 0).toSortedSet().zipWithNext { before, after -> after - before }
    }

    companion object {
        const val ODD_SIZES = "odd-sizes"
        const val ONE_BY_ONE = "one-by-one"
        private const val SLIDING = "sliding_attention"
        private const val MOST_WINDOWS = 4
        private const val MOST_TURNS = 3
        private const val MOST_IMAGES = 4
        private const val STEP_EVERYTHING = 1024
        private const val NEAR = 16
        private const val TAIL = 8
        private val ORDER = listOf(0, 0, 1, 0, 1, 1)

        /** The shapes that a plan for the model may have: ours, and the longer one of bundles up to version 0.4.0. */
        fun of(manifest: Manifest) = listOf(false, true).map { PlanShape(manifest, it) }
    }
}
