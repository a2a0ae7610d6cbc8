package org.gemmaedge.core

import kotlin.math.exp
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.double
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive
import kotlinx.serialization.json.long

class SamplerTest {
    private val cases = TextVectors.json("draws.json")

    private fun sampler(case: JsonElement): Sampler {
        val settings = Sampling(case[0].jsonPrimitive.double, case[1].jsonPrimitive.int, case[2].jsonPrimitive.double)
        return Sampler(settings, case[3].jsonPrimitive.long)
    }

    @Test
    fun randomNumbersAreNumPys() {
        for (case in cases["generators"]) {
            val seed = case[0].jsonPrimitive.long
            val random = Random(seed)
            for (number in case[1].jsonArray) assertEquals(number.jsonPrimitive.double, random.double(), "seed $seed")
            assertContentEquals(case[3].ids, Random(seed).integers(case[2].jsonPrimitive.int, 21), "seed $seed")
        }
    }

    @Test
    fun drawsArePythons() {
        var count = 0
        for (case in cases["small"]) {
            val sampler = sampler(case)
            val logits = case[4].jsonArray
                .map { if (it.isNull) Float.NEGATIVE_INFINITY else it.jsonPrimitive.double.toFloat() }.toFloatArray()
            val before = logits.copyOf()
            assertContentEquals(case[5].ids, IntArray(20) { sampler.sample(logits) }, "$case")
            assertContentEquals(before, logits)
            count += 20
        }
        println("draws from small vocabularies: $count")
    }

    @Test
    fun drawsFromTheReleasedVocabularyArePythons() {
        var count = 0
        var nanoseconds = 0L
        for (case in cases["large"]) {
            val sampler = sampler(case)
            for ((state, id) in case[4].jsonArray.zip(case[5].ids.toList())) {
                val logits = FakeEngine.logits(262_144, state.text.toULong().toLong(), 24)
                val start = System.nanoTime()
                assertEquals(id, sampler.sample(logits), "$case")
                nanoseconds += System.nanoTime() - start
                count++
            }
        }
        println("draws from 262144 ids: $count, %.1f ms each".format(nanoseconds / 1e6 / count))
    }

    @Test
    fun drawsFollowTheDistribution() {
        val logits = floatArrayOf(0f, 1f, 2f, -1f)
        val total = logits.sumOf { exp(it.toDouble()) }
        val sampler = Sampler(Sampling(1.0), 3)
        val counts = IntArray(4)
        repeat(20_000) { counts[sampler.sample(logits)]++ }
        // Three standard deviations of a share of one half.
        for (id in 0..3) assertEquals(exp(logits[id].toDouble()) / total, counts[id] / 20_000.0, 0.0107)
    }

    @Test
    fun equalLogitsLoseTheHighestIdsFirst() {
        val logits = FloatArray(9) { 1f }
        for (settings in listOf(Sampling(1.0, 3, 1.0), Sampling(1.0, 0, 0.33), Sampling(1.0, 3, 0.9))) {
            val sampler = Sampler(settings)
            assertEquals(setOf(0, 1, 2), List(200) { sampler.sample(logits) }.toSet(), "$settings")
        }
        assertEquals(0, Sampler(Sampling()).sample(logits))
    }

    @Test
    fun settingsOutOfRangeAreRefused() {
        for (settings in listOf(
            Sampling(-1.0), Sampling(Double.NaN), Sampling(Double.POSITIVE_INFINITY), Sampling(1.0, -1),
            Sampling(1.0, 0, 0.0), Sampling(1.0, 0, 1.1), Sampling(1.0, 0, Double.NaN),
        )) {
            assertFailsWith<BadInput>("$settings") { Sampler(settings) }
        }
        assertTrue("-1" in assertFailsWith<BadInput> { Sampler(Sampling(), -1) }.message!!)
    }

    @Test
    fun logitsThatAreNoNumbersAreNotDrawnFrom() {
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY)) {
            for (settings in listOf(Sampling(), Sampling(1.0))) {
                for (index in 0..2) {
                    val logits = FloatArray(3).also { it[index] = bad }
                    assertFailsWith<VerificationFailed> { Sampler(settings).sample(logits) }
                }
            }
        }
    }
}
