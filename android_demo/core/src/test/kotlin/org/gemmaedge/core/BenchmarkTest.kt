package org.gemmaedge.core

import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.encodeToString
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject

class BenchmarkTest {
    private class Fixed : Gauges {
        var asked = 0L

        override fun peakRssBytes() = 1000 * ++asked

        override fun thermalStatus() = 2
    }

    @Test
    fun figuresAreThoseOfTheClock() {
        val bundle = demoBundle(chunk = 4)
        var now = 0L
        val engines = ArrayList<FakeEngine>()
        val factory = EngineFactory { opened, format, threads ->
            assertEquals(Triple(bundle, "onnx", 3), Triple(opened, format, threads))
            now += 250_000_000
            FakeEngine(bundle.manifest) { now += if (it.position <= 8) 1_000_000 else 4_000_000 }.also { engines += it }
        }
        val seen = ArrayList<Int>()
        val benchmark = Benchmark(bundle, "onnx", 3, factory, Fixed()) { now }
        val measured = benchmark.run(8, 5, 3) { done, total ->
            assertEquals(4, total)
            seen += done
        }
        assertEquals(listOf(1, 2, 3, 4), seen)
        assertEquals(8 / 0.002, measured.prefill.mean, 1e-6)
        assertEquals(5 / 0.02, measured.decode.median, 1e-6)
        assertEquals(0.0, measured.decode.sd, 1e-6)
        assertEquals(0.25, measured.loadSeconds, 1e-9)
        assertEquals(1000 to 2000, measured.librariesRssBytes.toInt() to measured.peakRssBytes.toInt())
        assertTrue(engines.single().isClosed)
        assertEquals(4, engines.single().resets)
        assertContentEquals(Random(0).integers(4096, 13), engines.single().fed.toIntArray())
        val keys = Json.parseToJsonElement(Json.encodeToString(measured)).jsonObject.keys
        assertEquals(TextVectors.json("measurement.json")["keys"].map { it.text }.toSet() + "thermal_status", keys)
        val rate = Json.parseToJsonElement(Json.encodeToString(measured.decode)).jsonObject
        assertEquals(setOf("mean", "sd", "median"), rate.keys)
    }

    @Test
    fun ratesArePythons() {
        for (case in TextVectors.json("measurement.json")["rates"]) {
            val rates = case[0].jsonArray.map { it.text.toDouble() }
            val rate = Rate.of(rates)
            for ((value, expected) in listOf(rate.mean, rate.sd, rate.median).zip(case[1].jsonArray)) {
                assertEquals(expected.text.toDouble(), value, 1e-9)
            }
        }
    }

    @Test
    fun whatCannotBeMeasuredIsRefused() {
        val bundle = demoBundle()
        val benchmark = Benchmark(bundle, "onnx", null, { _, _, _ -> error("opened") }, Fixed())
        for (counts in listOf(Triple(0, 1, 1), Triple(1, 0, 1), Triple(1, 1, 0))) {
            assertFailsWith<BadInput> { benchmark.run(counts.first, counts.second, counts.third) }
        }
        assertFailsWith<DoesNotFit> { benchmark.run(400, 1) }
        assertFailsWith<DoesNotFit> { benchmark.run(Int.MAX_VALUE, Int.MAX_VALUE) }
    }

    @Test
    fun randomTextHoldsNoImageToken() {
        val bundle = demoBundle(seeing = true, context = 20_000)
        val engine = FakeEngine(bundle.manifest) // refuses the image token in a text
        val image = bundle.manifest.model.vision!!.imageTokenId
        assertTrue(image in Random(0).integers(4096, 19_000))
        Benchmark(bundle, "onnx", null, { _, _, _ -> engine }, Fixed()).run(18_900, 100, 1)
    }
}
