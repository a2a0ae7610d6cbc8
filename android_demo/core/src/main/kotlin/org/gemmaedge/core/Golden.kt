package org.gemmaedge.core

import java.io.IOException
import java.nio.FloatBuffer
import java.nio.IntBuffer
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sqrt

/** How a file's logits differ from a reference's at one position. The sums are over the [count] compared logits. */
class Difference(
    val position: Int,
    val maxAbs: Double,
    val sumAbs: Double,
    val sumSquares: Double,
    val referenceSquares: Double,
    val count: Int,
    val kl: Double,
    val sameTop: Boolean,
)

/**
 * A reference's logits at the positions of a plan, of `proof/golden.safetensors`. docs/bundle.md describes its arrays.
 *
 * Each of the P positions has a row of the same M columns of the vocabulary, and of K further ones, its largest.
 */
class Reference internal constructor(arrays: Map<String, StoredArray>, images: StoredArray) {
    init {
        checkShapes(arrays, images)
    }

    private val columns = arrays.ints("columns").toArray()
    private val values = arrays.floats("values")
    private val topColumns = arrays.ints("top_columns")
    private val topValues = arrays.floats("top_values")
    private val logSumExp = arrays.floats("log_sum_exp")
    private val argmax = arrays.ints("argmax")
    private val softTokenValues = arrays.floats("soft_tokens")
    private val top = arrays.getValue("top_values").shape[1]
    private val rows: Map<Int, Int>

    val ids: List<Int> = arrays.ints("ids").toArray().asList()
    val positions: List<Int> = arrays.ints("positions").toArray().asList()
    val softTokensShape: List<Int> = arrays.getValue("soft_tokens").shape
    val imagesShape: List<Int> = images.shape
    val largestColumn: Int

    val floatError = arrays.floats("float_error").toArray()
    val noiseKl = arrays.floats("noise_kl").toArray()
    val costKl = arrays.floats("cost_kl").toArray()
    val softNoise = arrays.floats("soft_noise").toArray()
    val softCost = arrays.floats("soft_cost").toArray()

    init {
        for ((name, distances) in listOf(
            "float_error" to floatError, "noise_kl" to noiseKl, "cost_kl" to costKl,
            "soft_noise" to softNoise, "soft_cost" to softCost,
        )) {
            require(distances.all { it.isFinite() && it >= 0 }) { "$name holds a value that is no distance" }
        }
        require(positions.isNotEmpty() && columns.isNotEmpty() && listOf(floatError, noiseKl, costKl).all { it.isNotEmpty() }) {
            "no logits to compare with"
        }
        val indices = mapOf(
            "positions" to positions, "columns" to columns.asList(),
            "top_columns" to topColumns.toArray().asList(), "argmax" to argmax.toArray().asList(),
        )
        for ((name, numbers) in indices) require(numbers.all { it >= 0 }) { "$name holds ${numbers.min()}" }
        largestColumn = maxOf(columns.max(), indices.getValue("top_columns").maxOrNull() ?: 0)
        rows = positions.indices.reversed().associateBy { positions[it] } // of two rows of one position, the first
    }

    /** The soft tokens of the image [number]. */
    fun softTokens(number: Int): SoftTokens {
        val (_, count, width) = softTokensShape
        val part = FloatArray(count * width) { softTokenValues[number * count * width + it] }
        return SoftTokens(count, width, part)
    }

    /**
     * Compares the [logits] of a file after the id at [position]. Null if there is no row for it.
     *
     * KL(p‖q) is summed as Σ [p log(p/q) − p + q], whose terms are all ≥ 0, so that the common columns estimate the sum
     * over those that the row leaves out.
     */
    fun compare(position: Int, logits: FloatArray): Difference? {
        val row = rows[position] ?: return null
        val ownColumns = IntArray(top) { topColumns[row * top + it] }
        val own = ownColumns.toHashSet()
        val common = columns.indices.filter { columns[it] !in own }
        val weight = if (common.isEmpty()) 1.0 else (logits.size - top) / common.size.toDouble()
        val logP = logSumExp[row].toDouble()
        val logQ = logSumExp(logits)
        var (maxAbs, sumAbs, sumSquares) = listOf(0.0, 0.0, 0.0)
        var (referenceSquares, kl) = listOf(0.0, 0.0)
        fun add(column: Int, expected: Double, standsFor: Double) {
            val seen = logits[column].toDouble()
            val delta = seen - expected
            maxAbs = maxOf(maxAbs, abs(delta)) // NaN, if one of the two is NaN
            sumAbs += abs(delta)
            sumSquares += delta * delta
            referenceSquares += expected * expected
            val p = expected - logP
            val q = seen - logQ
            kl += (exp(p) * (p - q) - exp(p) + exp(q)) * standsFor
        }
        for (index in 0 until top) add(ownColumns[index], topValues[row * top + index].toDouble(), 1.0)
        for (index in common) add(columns[index], values[row * columns.size + index].toDouble(), weight)
        val count = top + common.size
        val sameTop = argmax(logits) == argmax[row]
        return Difference(position, maxAbs, sumAbs, sumSquares, referenceSquares, count, kl, sameTop)
    }

    /** Of the rows at the positions [among]: the largest absolute logit, and each row's gap between its two largest. */
    internal fun rowsAt(among: Set<Int>): Pair<Float, List<Float>> {
        var largest = 0f
        val gaps = positions.indices.filter { positions[it] in among }.map { row ->
            val common = FloatArray(columns.size) { values[row * columns.size + it] }
            val own = FloatArray(top) { topValues[row * top + it] }
            largest = (common.asSequence() + own.asSequence()).fold(largest) { most, value -> maxOf(most, abs(value)) }
            val compared = if (top > 1) own else common
            compared.sort()
            if (compared.size > 1) compared[compared.size - 1] - compared[compared.size - 2] else 0f
        }
        return Pair(largest, gaps)
    }

    companion object {
        const val FILE = "proof/golden.safetensors"

        /** The axes of each array. Axes with the same letter have the same size. */
        private val AXES = mapOf(
            "ids" to "T", "positions" to "P", "columns" to "M", "values" to "PM", "top_columns" to "PK",
            "top_values" to "PK", "log_sum_exp" to "P", "argmax" to "P", "float_error" to "F", "noise_kl" to "N",
            "cost_kl" to "C", "soft_tokens" to "ISE", "soft_noise" to "L", "soft_cost" to "I",
        )
        private val INTEGERS = setOf("ids", "positions", "columns", "top_columns", "argmax")

        private fun checkShapes(arrays: Map<String, StoredArray>, images: StoredArray) {
            val sizes = mutableMapOf<Char, Int>()
            for ((name, axes) in AXES) {
                val shape = arrays.getValue(name).shape
                require(shape.size == axes.length) { "$name has the shape $shape" }
                for ((axis, size) in axes.toList().zip(shape)) {
                    val known = sizes.getOrPut(axis) { size }
                    require(known == size) { "$name has the shape $shape, another array $known along an axis" }
                }
            }
            val shape = images.shape
            require(images.dtype == "U8" && shape.size == 4 && shape[0] == sizes['I'] && shape[3] == Pixels.CHANNELS) {
                "images are ${images.dtype} $shape for ${sizes['I']} encoded ones"
            }
        }

        /** The references by key, and the images. Throws [VerificationFailed] when the file is damaged. */
        internal fun readAll(bundle: Bundle): Golden {
            try {
                val arrays = Safetensors.read(bundle.file(FILE))
                val images = requireNotNull(arrays["images"]) { "no images" }
                val keys = (arrays.keys - "images").map { it.substringBefore('.') }.distinct()
                val references = keys.associateWith { key ->
                    val own = AXES.keys.associateWith { name ->
                        val array = requireNotNull(arrays["$key.$name"]) { "no $key.$name" }
                        val dtype = if (name in INTEGERS) "I32" else "F32"
                        require(array.dtype == dtype) { "$key.$name is ${array.dtype}" }
                        array
                    }
                    Reference(own, images)
                }
                return Golden(references, images)
            } catch (_: IOException) {
                throw refused("cannot be read")
            } catch (error: IllegalArgumentException) {
                throw refused("not golden vectors (${oneLine(error)})")
            } catch (error: ArithmeticException) { // a shape whose product is over all integers
                throw refused("not golden vectors (${oneLine(error)})")
            }
        }

        internal fun refused(reason: String) = VerificationFailed("$FILE: $reason; export the bundle again")

        /** The root mean square of the difference, divided by that of [expected]; infinite if only that is zero. */
        internal fun relativeRms(seen: SoftTokens, expected: SoftTokens): Double {
            if (seen.values.size != expected.values.size) return Double.NaN
            var (squares, size) = listOf(0.0, 0.0)
            for (index in seen.values.indices) {
                val delta = seen.values[index].toDouble() - expected.values[index]
                squares += delta * delta
                size += expected.values[index].toDouble() * expected.values[index]
            }
            return if (size != 0.0) sqrt(squares / size) else if (squares != 0.0) Double.POSITIVE_INFINITY else 0.0
        }

        internal fun logSumExp(logits: FloatArray): Double {
            val peak = logits.max().toDouble()
            return peak + ln(logits.sumOf { exp(it - peak) })
        }

        /** The index of the first of the largest; of the first NaN if there is one. */
        internal fun argmax(logits: FloatArray): Int {
            val nan = logits.indexOfFirst { it.isNaN() }
            if (nan >= 0) return nan
            var best = 0
            for (index in logits.indices) if (logits[index] > logits[best]) best = index
            return best
        }
    }
}

/** The references of `proof/golden.safetensors` by key, and the images that all of them share. */
internal class Golden(val references: Map<String, Reference>, private val images: StoredArray) {
    val imageCount: Int get() = images.shape[0]

    fun image(number: Int): Pixels {
        val size = images.shape[1]
        val length = size * size * Pixels.CHANNELS
        return Pixels(size, ByteArray(length) { images.bytes[number * length + it] })
    }
}

private fun Map<String, StoredArray>.ints(name: String): IntBuffer = getValue(name).bytes.asIntBuffer()

private fun Map<String, StoredArray>.floats(name: String): FloatBuffer = getValue(name).bytes.asFloatBuffer()

private fun IntBuffer.toArray() = IntArray(limit()) { this[it] }

private fun FloatBuffer.toArray() = FloatArray(limit()) { this[it] }
