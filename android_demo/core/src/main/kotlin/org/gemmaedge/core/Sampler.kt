package org.gemmaedge.core

import kotlin.math.exp

/**
 * Draws ids from logits: by temperature, from the top-k most likely ids, then from the top-p nucleus.
 *
 * The nucleus is the smallest set of most likely ids whose probabilities sum to top-p. Of equal logits, the highest ids
 * are cut first. The same seed draws the ids that Python draws, except where a random number is within the rounding of
 * exp and of sums (some 1e-13) of the border between two ids. Throws [BadInput] for settings outside their range.
 */
class Sampler(private val settings: Sampling, seed: Long = 0) {
    private val random: Random

    init {
        with(settings) {
            if (!(temperature >= 0 && temperature < Double.POSITIVE_INFINITY)) {
                throw BadInput("the temperature is $temperature; use 0 (greedy) or more")
            }
            if (topK < 0) throw BadInput("top-k is $topK; use 0 (off) or more")
            if (!(topP > 0 && topP <= 1)) throw BadInput("top-p is $topP; use more than 0 and at most 1 (off)")
        }
        if (seed < 0) throw BadInput("the seed is $seed; use 0 or more")
        random = Random(seed)
    }

    /** Draws an id. Throws [VerificationFailed] when the logits hold NaN or are not below infinity. */
    fun sample(logits: FloatArray): Int {
        val best = argmax(logits)
        if (settings.temperature == 0.0) return best
        val largest = logits[best]
        val keepsAll = settings.topP == 1.0 && settings.topK !in 1 until logits.size
        val kept = if (keepsAll) null else kept(logits, largest)
        val weights = DoubleArray(kept?.size ?: logits.size) { weight(logits[kept?.get(it) ?: it], largest) }
        return draw(weights).let { kept?.get(it) ?: it }
    }

    private fun weight(logit: Float, largest: Float): Double = exp((logit.toDouble() - largest) / settings.temperature)

    /** The ids, in order, of the nucleus among the top-k ids. */
    private fun kept(logits: FloatArray, largest: Float): IntArray {
        val order = MostLikely(logits)
        val likeliest = if (settings.topK in 1 until logits.size) IntArray(settings.topK) { order.take() } else null
        val total = likeliest?.sumOf { weight(logits[it], largest) } ?: logits.sumOf { weight(it, largest) }
        val kept = Ids()
        var sum = 0.0
        for (rank in 0 until (likeliest?.size ?: logits.size)) {
            val id = likeliest?.get(rank) ?: order.take()
            val probability = weight(logits[id], largest) / total
            sum += probability
            if (sum - probability >= settings.topP) break
            kept += id
        }
        return kept.toIntArray().also { it.sort() }
    }

    /** Draws an index by [weights] as NumPy's `choice` does: the first with a cumulative share over a random number. */
    private fun draw(weights: DoubleArray): Int {
        val total = weights.sum()
        var sum = 0.0
        for (index in weights.indices) {
            sum += weights[index] / total
            weights[index] = sum
        }
        val wanted = random.double()
        var index = 0
        while (weights[index] / sum <= wanted) index++ // the last one is 1, and the random number is below
        return index
    }
}

/** The index of the largest of [logits], the first of equal ones. Throws [VerificationFailed] for NaN and infinity. */
internal fun argmax(logits: FloatArray): Int {
    var best = 0
    for (index in logits.indices) {
        if (logits[index].isNaN()) throw unusableLogits(logits[index])
        if (logits[index] > logits[best]) best = index
    }
    if (logits[best].isInfinite()) throw unusableLogits(logits[best])
    return best
}

private fun unusableLogits(value: Float) =
    VerificationFailed("the model answers with $value in place of a number; run the self-check, or export it again")

/** Gives ids from the most likely one on; of equal logits, the lowest id first. A heap: the first few are cheap. */
private class MostLikely(private val logits: FloatArray) {
    private val heap = IntArray(logits.size) { it }
    private var size = heap.size

    init {
        for (index in size / 2 - 1 downTo 0) sink(index)
    }

    fun take(): Int {
        val first = heap[0]
        heap[0] = heap[--size]
        sink(0)
        return first
    }

    private fun sink(from: Int) {
        val id = heap[from]
        var at = from
        while (true) {
            var child = 2 * at + 1
            if (child >= size) break
            if (child + 1 < size && isBefore(heap[child + 1], heap[child])) child++
            if (!isBefore(heap[child], id)) break
            heap[at] = heap[child]
            at = child
        }
        heap[at] = id
    }

    private fun isBefore(a: Int, b: Int): Boolean = logits[a] > logits[b] || (logits[a] == logits[b] && a < b)
}
