package org.gemmaedge.core

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.coroutines.cancellation.CancellationException
import kotlin.io.path.createTempDirectory
import kotlin.math.abs
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json

class SelfCheckTest {
    @Serializable
    class Check(
        val artifact: String,
        val id: String,
        val metric: String,
        val name: String,
        val value: Double,
        val limit: Double?,
        val passed: Boolean,
    )

    private val folder = VectorFiles.folder("selfcheck")
    private val json = Json { ignoreUnknownKeys = true }

    private fun bundle(name: String) = bundleAt("$name/bundle")

    /** Without [Bundle.read], which demands that the graphs are there. */
    private fun bundleAt(name: String): Bundle {
        val at = File(folder, name)
        return Bundle(at, json.decodeFromString(File(at, Bundle.MANIFEST).readText()))
    }

    private fun engine(name: String, format: String) =
        RecordedEngine(File(folder, "$name/$format"), bundle(name).manifest)

    private fun figures(name: String, format: String): Map<String, List<Check>> =
        json.decodeFromString(File(folder, "$name/$format/figures.json").readText())

    private fun compare(expected: List<Check>, rows: List<Row>, where: String) {
        assertEquals(expected.map { Triple(it.id, it.metric, it.name) }, rows.map { Triple(it.id, it.metric, it.name) })
        for ((check, row) in expected zip rows) {
            val at = "$where ${row.id} ${row.metric}: ${check.value} in Python, ${row.value}"
            // A KL divergence near 0 is a sum of differences of numbers near 1, which are exact to 1e-16.
            assertTrue(abs(check.value - row.value) <= 1e-9 * abs(check.value) + 1e-16, at)
            assertEquals(check.passed, row.passed, at)
            assertEquals(check.limit == null, row.limit == null, at)
            if (row.limit != null) assertTrue(abs(check.limit!! - row.limit) <= 1e-12 * check.limit, "$at ${row.limit}")
        }
    }

    @Test
    fun figuresAndLimitsAreThoseOfPython() {
        val real = File(folder, "real").list().orEmpty().map { "real/$it" }
        var compared = 0
        for (name in listOf("float", "seeing", "large") + real) {
            for (format in bundle(name).manifest.artifacts.keys) {
                val engine = engine(name, format)
                var last = Pair(0L, -1L)
                val result = SelfCheck(bundle(name), format, engine).run { done, total ->
                    assertEquals(last.first + 1, done)
                    last = Pair(done, total)
                }
                assertEquals(last.first, last.second)
                assertTrue(engine.everythingWasAsked)
                val expected = figures(name, format)
                val reference = expected.entries.firstOrNull { (_, checks) -> checks.all { it.passed } }?.key
                assertEquals(reference, result.reference)
                assertTrue(result.passed && !engine.closed)
                compare(expected.getValue(reference!!), result.rows, "$name .$format")
                compared += result.rows.size
            }
        }
        println("self-check: $compared figures equal Python's, of ${3 + real.size} bundles")
        assertEquals("int8-kleidiai", SelfCheck(bundle("seeing"), "onnx", engine("seeing", "onnx")).run().reference)
    }

    private fun failed(
        name: String,
        format: String,
        bundle: Bundle = bundle(name),
        fault: (Engine) -> Engine,
    ): Set<String> {
        val result = SelfCheck(bundle, format, fault(engine(name, format))).run()
        assertFalse(result.passed)
        assertNull(result.reference)
        return result.rows.filterNot { it.passed }.map { "${it.id} ${it.metric}" }.toSet()
    }

    /** [engine] with other logits: [change] gets the walk's number, the position and the right ones. */
    private class Changed(
        private val engine: RecordedEngine,
        private val change: (Int, Int, FloatArray) -> FloatArray,
    ) : Engine by engine {
        override fun feed(call: Call): FloatArray {
            val logits = engine.feed(call)
            return change(engine.walk, engine.position - 1, logits)
        }
    }

    private fun changed(change: (walk: Int, position: Int, logits: FloatArray) -> FloatArray): (Engine) -> Engine =
        { Changed(it as RecordedEngine, change) }

    @Test
    fun oneBadPositionFails() {
        for ((name, format) in listOf("float" to "pte", "seeing" to "pte", "large" to "onnx")) {
            val last = ProofPlan.read(bundle(name)).plan.ids.size - 1
            val failed = failed(name, format, fault = changed { walk, position, logits ->
                if (walk == 1 && position == last) logits.reversedArray() else logits
            })
            val metric = if (name == "float") Metric.MAX_ABS else Metric.KL_MAX
            assertTrue("landmark/last $metric" in failed && "walk/one-by-one $metric" in failed, "$name: $failed")
            if (format == "pte") assertTrue(failed.all { "landmark/last " in it || "one-by-one" in it }, "$failed")
        }
    }

    @Test
    fun swappedSoftTokensFail() {
        val failed = failed("seeing", "pte") { right ->
            object : Engine by right {
                override fun encode(image: Pixels): SoftTokens {
                    val own = right.encode(image)
                    return SoftTokens(own.count, own.width, own.values.reversedArray())
                }
            }
        }
        assertEquals(setOf("soft-tokens/image-1 soft_rms", "soft-tokens/image-2 soft_rms"), failed)
    }

    @Test
    fun oneUnitInTheLastPlaceAfterAResetFails() {
        val failed = failed("large", "pte", fault = changed { walk, _, logits ->
            if (walk == 4) FloatArray(logits.size) { Math.nextUp(logits[it]) } else logits
        })
        assertEquals(setOf("reset max_abs"), failed)
    }

    @Test
    fun notANumberFailsWhereverItIs() {
        for (name in listOf("float", "large")) {
            val length = ProofPlan.read(bundle(name)).plan.ids.size
            val golden = Reference.readAll(bundle(name)).references.values.first().positions
            for (wrong in listOf(0, golden[golden.size / 2], length - 1)) {
                for (inWalk in 0..4) {
                    val engine = Changed(engine(name, "pte")) { walk, position, logits ->
                        if (walk == inWalk && position == wrong) logits[logits.size - 1] = Float.NaN
                        logits
                    }
                    val result = SelfCheck(bundle(name), "pte", engine).run()
                    val ends = Limits.ends(ProofPlan.read(bundle(name)).plan.walks.values.elementAt(inWalk % 4))
                    assertEquals(wrong !in ends, result.passed, "$name, walk $inWalk, position $wrong")
                    if (inWalk == 4 && wrong in ends) {
                        assertEquals(listOf("reset"), result.rows.filterNot { it.passed }.map { it.id })
                    }
                }
            }
            val all = failed(name, "pte", fault = changed { _, _, logits -> logits.also { it.fill(Float.NaN) } })
            assertTrue(all.any { it.startsWith("walk/chunks") } && all.any { it.startsWith("reset") })
        }
    }

    @Test
    fun infiniteLogitsFail() {
        for (value in listOf(Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY)) {
            failed("seeing", "pte", fault = changed { _, _, logits -> logits.also { it[7] = value } })
        }
    }

    @Test
    fun aPlanCannotLoosenTheLimits() {
        for (change in listOf("loosened", "without_limits")) {
            val loose = bundleAt("loosened/$change")
            assertTrue(SelfCheck(loose, "pte", engine("seeing", "pte")).run().passed)
            val failed = failed("seeing", "pte", loose, changed { _, _, logits -> logits.reversedArray() })
            assertTrue("walk/chunks kl_mean" in failed)
        }
    }

    @Test
    fun anotherVocabularyIsSaid() {
        val engine = Changed(engine("float", "onnx")) { _, _, logits -> logits.copyOf(7) }
        val check = SelfCheck(bundle("float"), "onnx", engine)
        assertEquals(
            ".onnx: gives 7 logits for a vocabulary of 160; do not use this file",
            assertFailsWith<VerificationFailed> { check.run() }.message,
        )
    }

    @Test
    fun itStopsWhenAsked() {
        var asked = 0
        val engine = engine("seeing", "pte")
        assertFailsWith<CancellationException> { SelfCheck(bundle("seeing"), "pte", engine).run({ ++asked == 20 }) }
        assertEquals(20, asked)
        assertFalse(engine.everythingWasAsked)
    }

    @Serializable
    class ManifestAndPlan(val manifest: Manifest, val plan: Plan)

    @Test
    fun plansAreThoseOfPythonAndNoOther() {
        val all = json.decodeFromString<List<ManifestAndPlan>>(File(folder, "plans.json").readText())
        for ((number, one) in all.withIndex()) {
            val (shapes, plan) = Pair(PlanShape.of(one.manifest), one.plan)
            assertTrue(shapes.any { it.isThatOf(plan) }, "plan $number")
            val walks = plan.walks - "chunks"
            val others = listOf(
                Plan(plan.ids + 5, plan.walks, plan.landmarks, plan.imagePlaces, plan.imageNumbers),
                Plan(plan.ids, walks, plan.landmarks, plan.imagePlaces, plan.imageNumbers),
                Plan(plan.ids, plan.walks, plan.landmarks - "last", plan.imagePlaces, plan.imageNumbers),
                Plan(plan.ids, plan.walks, plan.landmarks, plan.imagePlaces + 1, plan.imageNumbers),
                Plan(plan.ids, plan.walks, plan.landmarks, plan.imagePlaces, plan.imageNumbers + 1),
            )
            assertTrue(others.none { other -> shapes.any { it.isThatOf(other) } }, "plan $number")
        }
        println("self-check: ${all.size} plans equal Python's")
    }

    private fun refusal(bundle: Bundle): String {
        val nothing = object : Engine by engine("seeing", "pte") {
            override fun feed(call: Call) = error("fed")

            override fun encode(image: Pixels) = error("encoded")
        }
        val message = assertFailsWith<VerificationFailed> { SelfCheck(bundle, "pte", nothing).run() }.message!!
        assertTrue('\n' !in message && message.endsWith("; export the bundle again"), message)
        return message.substringBefore(':')
    }

    @Test
    fun damagedProofsAreRefusedNamingTheFile() {
        val expected = json.decodeFromString<Map<String, String>>(File(folder, "damaged/expected.json").readText())
        val manifest = bundle("seeing").manifest
        for ((name, file) in expected) {
            assertEquals(file, refusal(Bundle(File(folder, "damaged/$name"), manifest)), name)
        }
        assertTrue(expected.size > 40)
    }

    @Test
    fun aProofThatIsNotListedIsRefused() {
        val right = bundle("seeing")
        for (name in listOf(ProofPlan.FILE, Reference.FILE)) {
            val manifest = right.manifest.copy(files = right.manifest.files - name)
            assertEquals(name, refusal(Bundle(right.folder, manifest)))
        }
    }

    @Test
    fun filesCutShortAreRefused() {
        val right = bundle("seeing")
        val copy = Bundle(createTempDirectory("cut").toFile(), right.manifest)
        right.folder.copyRecursively(copy.folder, overwrite = true)
        for (name in listOf(ProofPlan.FILE, Reference.FILE)) {
            val whole = right.file(name).readBytes()
            val newline = whole.size - 1 // whose lack is no damage
            for (length in whole.indices.filter { it % 997 == 0 || it < 32 || it > whole.size - 8 } - newline) {
                copy.file(name).writeBytes(whole.copyOf(length))
                assertEquals(name, refusal(copy), "$length bytes of $name")
            }
            copy.file(name).writeBytes(whole + 0)
            assertEquals(name, refusal(copy))
            copy.file(name).writeBytes(whole)
        }
        copy.folder.deleteRecursively()
    }

    @Test
    fun listsInListsAreRefused() {
        val right = bundle("seeing")
        val copy = Bundle(createTempDirectory("deep").toFile(), right.manifest)
        right.folder.copyRecursively(copy.folder, overwrite = true)
        val deep = "[".repeat(1_000_000)
        copy.file(ProofPlan.FILE).writeText(deep)
        assertEquals(ProofPlan.FILE, refusal(copy))
        right.file(ProofPlan.FILE).copyTo(copy.file(ProofPlan.FILE), overwrite = true)
        val length = ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(1_000_000).array()
        copy.file(Reference.FILE).writeBytes(length + deep.toByteArray())
        assertEquals(Reference.FILE, refusal(copy))
        copy.folder.deleteRecursively()
    }

    @Test
    fun aPlanThatWouldTakeAllMemoryIsNotRead() {
        val copy = Bundle(createTempDirectory("huge").toFile(), bundle("seeing").manifest)
        copy.folder.resolve("proof").mkdir()
        copy.file(ProofPlan.FILE).writeText("{\"x\":[" + "1,".repeat(5_000_000) + "1]}")
        val message = assertFailsWith<VerificationFailed> { ProofPlan.read(copy) }.message!!
        assertTrue("10000009 bytes" in message, message)
        copy.folder.deleteRecursively()
    }

    @Test
    fun randomChangesAreReadOrRefused() {
        val random = Random(3)
        val right = bundle("seeing")
        val copy = Bundle(createTempDirectory("changed").toFile(), right.manifest)
        right.folder.copyRecursively(copy.folder, overwrite = true)
        var refused = 0
        for (name in listOf(ProofPlan.FILE, Reference.FILE)) {
            val whole = right.file(name).readBytes()
            repeat(200) {
                val bytes = whole.clone()
                repeat(1 + random.nextInt(3)) {
                    bytes[random.nextInt(minOf(bytes.size, 6000))] = random.nextInt().toByte()
                }
                copy.file(name).writeBytes(bytes)
                try {
                    SelfCheck(copy, "pte", engine("seeing", "pte")).run()
                } catch (error: VerificationFailed) {
                    assertTrue('\n' !in error.message!!)
                    refused++
                }
            }
            copy.file(name).writeBytes(whole)
        }
        assertTrue(refused > 250, "$refused")
        copy.folder.deleteRecursively()
    }
}
