package org.gemmaedge.core

import kotlin.math.sqrt

/** The figures of checks. They pass up to their limit, [TOP1_AGREEMENT] from it upwards. NaN never passes a limit. */
object Metric {
    const val SOFT_RMS = "soft_rms"
    const val MAX_ABS = "max_abs"
    const val MEAN_ABS = "mean_abs"
    const val RELATIVE_RMS = "relative_rms"
    const val KL_MEAN = "kl_mean"
    const val KL_MAX = "kl_max"
    const val KL_WORST_POSITION = "kl_worst_position"
    const val TOP1_AGREEMENT = "top1_agreement"
    val ALL = listOf(SOFT_RMS, MAX_ABS, MEAN_ABS, RELATIVE_RMS, KL_MEAN, KL_MAX, KL_WORST_POSITION, TOP1_AGREEMENT)

    fun passes(metric: String, value: Double, limit: Double?): Boolean = when {
        limit == null -> true
        metric == TOP1_AGREEMENT -> value >= limit
        else -> value <= limit
    }
}

/**
 * The limits that follow from what was measured on a reference itself. docs/validation.md gives the reasons.
 *
 * The same as runtime_py/proof/limits.py: they hold beside the plan's own, so that a plan cannot loosen them.
 */
internal object Limits {
    private const val FLOAT = "float"
    private const val FLOAT_ERROR = 4.0
    private const val UNITS = 16.0 / (1 shl 23) // 16 units in the last place of float32
    private const val NOISE = 2.0
    private const val PEAK_NOISE = 4.0
    private const val COST = 0.5
    private const val MOST_COST = 4.0
    private const val LEAST_KL_MEAN = 1e-5
    private const val LEAST_KL_MAX = 1e-4

    /** The limits of all checks that replay [plan] against [reference] of the name [name], by check id and metric. */
    fun of(plan: Plan, reference: Reference, name: String): Tolerances {
        val found = mutableMapOf<String, Map<String, Double>>()
        if (reference.softNoise.isNotEmpty()) {
            val within = mapOf(Metric.SOFT_RMS to softRms(reference, name))
            for (number in 0 until reference.softTokensShape[0]) found[CheckId.softTokens(number)] = within
        }
        for ((walk, lengths) in plan.walks) {
            val compared = reference.positions.toSet() intersect ends(lengths).toSet()
            if (compared.isEmpty()) continue
            val within = when {
                isFloat(reference, name) -> floatLimits(reference, compared)
                else -> roundedLimits(reference, compared.size)
            }
            found[CheckId.walk(walk)] = within
            if (walk != PlanShape.ONE_BY_ONE) continue
            val atOne = within.filterKeys { it == Metric.MAX_ABS || it == Metric.KL_MAX }
            for ((landmark, _) in plan.landmarks.filterValues { it in compared }) found[CheckId.landmark(landmark)] = atOne
        }
        found[CheckId.RESET] = mapOf(Metric.MAX_ABS to 0.0)
        return found
    }

    /** For every check and metric that has a limit in either, the stricter of the two. */
    fun stricter(one: Tolerances, other: Tolerances): Tolerances = (one.keys + other.keys).associateWith { id ->
        val (mine, theirs) = Pair(one[id].orEmpty(), other[id].orEmpty())
        (mine.keys + theirs.keys).associateWith { metric ->
            val limits = listOfNotNull(mine[metric], theirs[metric])
            if (metric == Metric.TOP1_AGREEMENT) limits.max() else limits.min()
        }
    }

    /** With int8 caches the float reference rounds keys and values, and has a cost. */
    private fun isFloat(reference: Reference, name: String) = name == FLOAT && reference.costKl.all { it == 0f }

    private fun floatLimits(reference: Reference, compared: Set<Int>): Map<String, Double> {
        val (largest, gaps) = reference.rowsAt(compared)
        val maxAbs = maxOf(FLOAT_ERROR * reference.floatError.max(), UNITS * largest)
        val ties = gaps.count { it <= (2 * maxAbs).toFloat() }
        return mapOf(Metric.MAX_ABS to maxAbs, Metric.TOP1_AGREEMENT to 1.0 - ties / gaps.size.toDouble())
    }

    private fun roundedLimits(reference: Reference, positions: Int): Map<String, Double> {
        val (noise, cost) = Pair(mean(reference.noiseKl), mean(reference.costKl))
        val mostCost = reference.costKl.max().toDouble()
        val highest = minOf(PEAK_NOISE * reference.noiseKl.max(), MOST_COST * mostCost)
        val average = NOISE * noise + highest / positions
        return mapOf(
            Metric.KL_MEAN to maxOf(LEAST_KL_MEAN, minOf(average, MOST_COST * cost), COST * cost),
            Metric.KL_MAX to maxOf(LEAST_KL_MAX, highest, COST * mostCost),
        )
    }

    private fun softRms(reference: Reference, name: String): Double {
        val noise = reference.softNoise.max().toDouble()
        if (isFloat(reference, name)) return maxOf(FLOAT_ERROR * noise, UNITS)
        return maxOf(PEAK_NOISE * noise, sqrt(COST) * (reference.softCost.maxOrNull() ?: 0f))
    }

    /** The position of the last id of each call. */
    fun ends(lengths: List<Int>): List<Int> = lengths.runningReduce(Int::plus).map { it - 1 }

    /** The mean in float32, added in numpy's order, so that figures and limits equal Python's. */
    fun mean(values: FloatArray): Double = (sum(values, 0, values.size) / values.size).toDouble()

    private fun sum(values: FloatArray, start: Int, count: Int): Float {
        if (count < 8) return (0 until count).fold(-0f) { sum, index -> sum + values[start + index] }
        if (count > 128) {
            val half = count / 2 / 8 * 8
            return sum(values, start, half) + sum(values, start + half, count - half)
        }
        val eight = FloatArray(8) { values[start + it] }
        val whole = count / 8 * 8
        for (index in 8 until whole) eight[index % 8] += values[start + index]
        val all = ((eight[0] + eight[1]) + (eight[2] + eight[3])) + ((eight[4] + eight[5]) + (eight[6] + eight[7]))
        return (whole until count).fold(all) { sum, index -> sum + values[start + index] }
    }
}

/** The ids of checks, as in plan.json and in Python's figures. */
internal object CheckId {
    const val RESET = "reset"
    const val NOISE = "noise"
    const val ACTIVATIONS = "activations"

    fun walk(walk: String) = "walk/$walk"

    fun landmark(landmark: String) = "landmark/$landmark"

    fun softTokens(number: Int) = "soft-tokens/image-${number + 1}"
}
