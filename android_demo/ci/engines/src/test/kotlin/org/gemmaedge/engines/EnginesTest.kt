package org.gemmaedge.engines

import java.io.File
import java.nio.file.Files
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertTrue
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Call
import org.gemmaedge.core.Pixels

class EnginesTest {
    private val image = Pixels(112, Random(3).nextBytes(112 * 112 * 3))

    @Test
    fun logitsAreTheCallersOwn() = forEach("demo") { bundle, format ->
        Engines.open(bundle, format, threads = 1).use { engine ->
            val first = engine.feed(Call.Text(intArrayOf(2, 100, 200)))
            val copy = first.copyOf()
            val second = engine.feed(Call.Text(intArrayOf(300)))
            assertContentEquals(copy, first)
            assertFalse(first.contentEquals(second))
            assertEquals(4, engine.position)
            engine.reset()
            assertEquals(0, engine.position)
            assertContentEquals(copy, engine.feed(Call.Text(intArrayOf(2, 100, 200))))
        }
    }

    @Test
    fun picturesAreSeenAndTheVisionModelMayComeAgain() = forEach("demo-vision") { bundle, format ->
        Engines.open(bundle, format, threads = 1).use { engine ->
            fun logits(pixels: Pixels): FloatArray {
                engine.reset()
                engine.feed(Call.Text(intArrayOf(2, 7)))
                engine.feed(Call.Image(engine.encode(pixels)))
                return engine.feed(Call.Text(intArrayOf(8, 100)))
            }
            val seen = logits(image)
            assertEquals(20, engine.position)
            assertFalse(seen.contentEquals(logits(Pixels(112, ByteArray(image.rgb.size)))))
            assertContentEquals(seen, logits(image))
            val (once, twice) = engine.encode(image) to engine.encode(image)
            assertContentEquals(once.values, twice.values)
            assertEquals(16 to bundle.manifest.model.hiddenSize, once.count to once.width)
        }
    }

    @Test
    fun damagedAndForeignFilesAreOneSentence() = forEach("demo", "demo-vision") { bundle, format ->
        val name = bundle.artifact(format).file
        val right = bundle.file(name).readBytes()
        val random = Random(5)
        val damage = mapOf(
            "empty" to ByteArray(0),
            "cut short" to right.copyOf(right.size / 3),
            "noise" to random.nextBytes(5000),
            "text" to "not a model\n".toByteArray(),
        )
        for ((what, bytes) in damage) {
            val error = assertFailsWith<BadInput>("$format, $what") { Engines.open(withFile(bundle, name, bytes), format, 1).close() }
            assertSentence(error, name)
        }
        val gone = assertFailsWith<BadInput> { Engines.open(withFile(bundle, name, null), format, 1).close() }
        assertSentence(gone, name)
    }

    @Test
    fun aFileOfAnotherLayoutIsRefused() = forEach("demo", "demo-vision") { bundle, format ->
        val manifest = bundle.manifest
        val artifact = manifest.artifacts.getValue(format)
        val longer = artifact.copy(cache = artifact.cache.copy(context = 999, layers = artifact.cache.layers.map { it.copy(slots = it.slots + 1) }))
        val others = listOf(
            manifest.copy(artifacts = manifest.artifacts + (format to longer)),
            manifest.copy(model = manifest.model.copy(vocabSize = 4000)),
        )
        for (other in others) {
            assertSentence(assertFailsWith<BadInput>(format) { Engines.open(Bundle(bundle.folder, other), format, 1).close() }, artifact.file)
        }
    }

    @Test
    fun aTextModelAndAVisionModelAreNotTakenForEachOther() = forEach("demo") { bundle, format ->
        val seeing = Bundles.read("demo-vision")
        val taken = Bundle(bundle.folder, seeing.manifest)
        assertSentence(assertFailsWith<BadInput> { Engines.open(taken, format, 1).close() }, bundle.artifact(format).file)
        Engines.open(bundle, format, threads = 1).use { engine -> assertFailsWith<BadInput> { engine.encode(image) } }
    }

    @Test
    fun anUnknownFormatIsRefused() {
        assertFailsWith<BadInput> { Engines.open(Bundles.read("demo"), "gguf", null) }
    }

    @Test
    fun anInitializerIsTakenOut() {
        val seeing = Bundles.read("demo-vision").file("model.onnx").readBytes()
        val without = checkNotNull(withoutInitializer(seeing, "soft_tokens"))
        assertTrue(without.size in seeing.size - 100 until seeing.size)
        assertEquals(null, withoutInitializer(without, "soft_tokens"))
        val random = Random(4)
        repeat(2000) {
            val changed = seeing.copyOf(random.nextInt(1, seeing.size))
            changed[random.nextInt(minOf(200, changed.size))] = random.nextInt().toByte()
            withoutInitializer(changed, "soft_tokens") // ends, and throws nothing
        }
    }

    private fun forEach(vararg bundles: String, test: (Bundle, String) -> Unit) {
        for (name in bundles) for (format in Bundles.formats) test(Bundles.read(name), format)
    }

    private fun assertSentence(error: BadInput, file: String) {
        val message = error.message!!
        assertTrue(message.startsWith(file) && ';' in message && '\n' !in message && message.length < 600, message)
    }

    /** The bundle with other bytes in one file (null: without it), in a folder of its own. */
    private fun withFile(bundle: Bundle, name: String, bytes: ByteArray?): Bundle {
        val folder = Files.createTempDirectory("bundle").toFile()
        folder.deleteOnExit()
        for (file in bundle.folder.listFiles().orEmpty().filter { it.isFile && it.name != name }) {
            Files.createSymbolicLink(File(folder, file.name).toPath(), file.toPath().toAbsolutePath())
        }
        if (bytes != null) File(folder, name).writeBytes(bytes)
        return Bundle(folder, bundle.manifest)
    }
}
