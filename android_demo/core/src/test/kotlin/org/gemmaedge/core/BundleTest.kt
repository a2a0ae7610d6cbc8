package org.gemmaedge.core

import java.io.File
import java.nio.file.Files
import java.nio.file.Path
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.encodeToString
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonObject
import org.junit.jupiter.api.io.TempDir

class BundleTest {
    @TempDir
    lateinit var temporary: Path

    private val json = Json { encodeDefaults = true }
    private val folder: File get() = File(temporary.toFile(), "bundle")

    /** A bundle with five small files; [change] edits the text of its manifest. */
    private fun write(change: (String) -> String = { it }): Bundle {
        val files = mapOf(
            "model.onnx" to ByteArray(3000) { it.toByte() },
            "model.onnx.data" to Random(1).nextBytes(2_500_000),
            "tokenizer.model" to TextVectors.file("demo.model").readBytes(),
            "proof/plan.json" to "{}".toByteArray(),
            "empty" to ByteArray(0),
        )
        File(folder, "proof").mkdirs()
        files.forEach { (name, bytes) -> File(folder, name).writeBytes(bytes) }
        val entries = files.mapValues { FileEntry(it.value.size.toLong(), sha256(it.value)) }
        val onnx = demoBundle().artifact("onnx").copy(files = listOf("model.onnx", "model.onnx.data"))
        val manifest = demoBundle(seeing = true).manifest.copy(files = entries, artifacts = mapOf("onnx" to onnx))
        File(folder, "manifest.json").writeText(change(json.encodeToString(manifest)))
        return Bundle(folder, manifest)
    }

    private fun refusal(): String = assertFailsWith<UserError> { Bundle.verify(Bundle.read(folder)) }.message!!

    private fun assertRefused(word: String) {
        val message = refusal()
        assertTrue(word in message && '\n' !in message && message.length < 300, "$word: $message")
    }

    @Test
    fun aWholeBundleIsReadAndVerified() {
        write()
        val bundle = Bundle.read(folder)
        assertEquals(write().manifest, bundle.manifest)
        val seen = ArrayList<Pair<Long, Long>>()
        Bundle.verify(bundle) { done, total -> seen += done to total }
        val total = bundle.manifest.files.values.sumOf { it.size }
        assertEquals(total to total, seen.last())
        assertEquals(seen.sortedBy { it.first }, seen)
        assertTrue(seen.size > 3)
        assertContentEquals(TextVectors.tokenizer("demo").encode("x y", true), bundle.tokenizer.encode("x y", true))
        assertTrue("has no .pte; it has .onnx" in assertFailsWith<BadInput> { bundle.artifact("pte") }.message!!)
    }

    @Test
    fun everyChangedByteIsFound() {
        val names = write().manifest.files.filter { it.value.size > 0 }.keys.toList()
        val draw = Random(2)
        repeat(60) { round ->
            val name = names[round % names.size]
            val file = File(folder, name)
            val bytes = file.readBytes()
            val at = draw.nextInt(bytes.size)
            val bit = 1 shl draw.nextInt(8)
            file.writeBytes(bytes.copyOf().also { it[at] = (it[at].toInt() xor bit).toByte() })
            Bundle.read(folder)
            assertRefused("$name has another content")
            file.writeBytes(bytes)
        }
        Bundle.verify(Bundle.read(folder))
    }

    @Test
    fun anotherTokenizerIsNotRead() {
        val bundle = write()
        File(folder, "tokenizer.model").writeBytes(TextVectors.file("odd.model").readBytes())
        assertFailsWith<VerificationFailed> { bundle.tokenizer }
    }

    @Test
    fun filesMustBeThereWholeAndNoMore() {
        write()
        File(folder, "model.onnx").appendBytes(ByteArray(1))
        assertRefused("model.onnx has 3001 bytes, its manifest says 3000")
        File(folder, "model.onnx").delete()
        assertRefused("model.onnx is missing")
        File(folder, "model.onnx").mkdir()
        assertRefused("model.onnx is missing or not a plain file")
        File(folder, "model.onnx").delete()
        write()
        val extras = mapOf(
            "more.bin" to "more.bin", ".hidden" to ".hidden", "proof/more.bin" to "proof/more.bin",
            "proof/.hidden" to "proof/.hidden", "weights/more.bin" to "weights", "proof/deep/x" to "proof/deep",
        )
        for ((extra, named) in extras) {
            val file = File(folder, extra)
            file.parentFile.mkdirs()
            file.writeBytes(ByteArray(1))
            assertRefused("$named is not in the bundle's manifest; delete it")
            file.delete()
            for (left in listOf("weights", "proof/deep")) File(folder, left).delete()
        }
        Bundle.verify(Bundle.read(folder))
        write { text -> edit(text, "files") { files -> JsonObject(files.jsonObject - "proof/plan.json") } }
        File(folder, "proof").deleteRecursively()
        File(folder, "proof").writeText("no folder")
        assertRefused("proof is not in the bundle's manifest")
    }

    @Test
    fun linksAreNotFollowed() {
        write()
        val outside = File(temporary.toFile(), "outside").apply { mkdir() }
        for (name in listOf("model.onnx", "proof/plan.json")) {
            val file = File(folder, name)
            val target = File(outside, file.name)
            file.copyTo(target)
            file.delete()
            Files.createSymbolicLink(file.toPath(), target.toPath())
            assertRefused("$name is missing or not a plain file")
            file.delete()
            target.renameTo(file)
        }
        Bundle.read(folder)
        File(folder, "proof").renameTo(File(outside, "proof"))
        Files.createSymbolicLink(File(folder, "proof").toPath(), File(outside, "proof").toPath())
        assertRefused("proof/plan.json is missing or not a plain file")
    }

    @Test
    fun namesMustBeInsideTheFolder() {
        File(temporary.toFile(), "secret").writeText("{}")
        val names = listOf(
            "../secret", "/etc/hostname", "proof/../../secret", "..", ".", "proof", "a/b", "proof/", "/x", "./x",
            "proof/../empty", "proof\\\\x", "", "proof//plan.json",
        )
        for (name in names) {
            write { it.replace("\"empty\"", "\"$name\"") }
            File(folder, "empty").delete()
            val error = assertFailsWith<VerificationFailed>(name) { Bundle.read(folder) }
            assertTrue("not a plain file of the bundle" in error.message!!, error.message)
        }
    }

    @Test
    fun theManifestsVersionDecides() {
        for (version in listOf("4.0", "4.1", "4.9999")) {
            write { it.replace("\"schema_version\":\"4.0\"", "\"schema_version\":\"$version\",\"new_key\":[1]") }
            assertEquals(version, Bundle.read(folder).manifest.schemaVersion)
        }
        val others = listOf("3.9", "5.0", "4", "4.", "4.x", "4.12345", "4.٣", "40.1", "4.0\\n").map { "\"$it\"" }
        for (version in others + listOf("4.0", "null", "[]")) {
            write { it.replace("\"schema_version\":\"4.0\"", "\"schema_version\":$version") }
            assertTrue("this app reads 4.x" in assertFailsWith<BadInput>(version) { Bundle.read(folder) }.message!!)
        }
        write { it.replace("\"schema_version\":\"4.0\",", "") }
        assertRefused("this app reads 4.x")
    }

    @Test
    fun aManifestThatContradictsItselfIsRefused() {
        val changes = mapOf<String, (String) -> String>(
            "has no artifacts" to { text -> edit(text, "artifacts") { JsonObject(emptyMap()) } },
            "another context or chunk" to { it.replaceFirst("\"context\":400", "\"context\":401") },
            "has the dtype float16, which this" to { it.replace("\"dtype\":\"float32\"", "\"dtype\":\"float16\"") },
            "chunk is -1" to { it.replace("\"chunk\":16", "\"chunk\":-1") },
            "head_dim is 0" to { it.replace("\"head_dim\":8", "\"head_dim\":0") },
            "not those of the model" to { it.replace("\"kind\":\"full_attention\"", "\"kind\":\"sliding_attention\"") },
            "image token 4096 outside" to { it.replace("\"image_token_id\":9", "\"image_token_id\":4096") },
            "does not list model.bin" to { it.replace("\"file\":\"model.onnx\"", "\"file\":\"model.bin\"") },
            "two different sha256" to { text ->
                edit(text, "tokenizer") { JsonObject(it.jsonObject + ("sha256" to JsonPrimitive("0"))) }
            },
            "damaged" to { it.replace("\"chunk\":16", "\"chunk\":\"many\"") },
            "holds no object" to { "[1]" },
            "\"chunk\" twice" to { it.replaceFirst("\"chunk\":16", "\"chunk\":16,\"chunk\":16") },
            "model\\/onnx\" twice" to { it.replaceFirst("\"chunk\":16", "\"model/onnx\":1,\"model\\/onnx\":16") },
            "damaged (" to { "\uFEFF$it" },
            "does not list other.onnx" to {
                it.replaceFirst("\"methods\":[", "\"methods\":[{\"name\":\"forward\",\"file\":\"other.onnx\"}")
            },
            "ch\\u0075nk\" twice" to { it.replaceFirst("\"chunk\":16", "\"chunk\":16,\"ch\\u0075nk\":16") },
            "nested too deeply" to { it.dropLast(1) + ",\"x\":" + "[".repeat(100_000) + "]".repeat(100_000) + "}" },
            "too many" to { it + " ".repeat(5 shl 20) },
            "bos_id -1 outside" to { it.replace(Regex("\"bos_id\":\\d+"), "\"bos_id\":-1") },
            "bos_id 4096 outside" to { it.replace(Regex("\"bos_id\":\\d+"), "\"bos_id\":4096") },
            "model.onnx has -1 bytes, which cannot be" to { it.replace("\"size\":3000", "\"size\":-1") },
            // Two of them, so that the sum is negative and seems to fit on any disk.
            "bytes, which cannot be" to {
                it.replace(Regex("\"size\":(3000|0)\\b"), "\"size\":${Long.MAX_VALUE}")
            },
            "lists EMPTY and empty" to { it.replace("\"empty\":", "\"EMPTY\":{\"size\":0,\"sha256\":\"\"},\"empty\":") },
            "is damaged" to { it.dropLast(1) },
        )
        for ((word, change) in changes) {
            write(change)
            assertRefused(word)
        }
        write()
        File(folder, "manifest.json").writeBytes(byteArrayOf('{'.code.toByte(), -1, '}'.code.toByte()))
        assertRefused("not text in UTF-8")
        File(folder, "manifest.json").delete()
        assertRefused("bundle has no manifest.json")
    }

    private fun edit(text: String, key: String, change: (JsonElement) -> JsonElement): String {
        val data = Json.parseToJsonElement(text).jsonObject
        return JsonObject(data + (key to change(data.getValue(key)))).toString()
    }

    @Test
    fun aDamagedManifestIsRefusedInOneSentenceOrRead() {
        write()
        val file = File(folder, "manifest.json")
        val good = file.readBytes()
        val draw = Random(3)
        var refused = 0
        repeat(2000) {
            val bytes = if (it % 2 == 0) good.copyOf(draw.nextInt(good.size)) else good.copyOf()
            repeat(if (bytes.isEmpty()) 0 else draw.nextInt(1, 4)) {
                bytes[draw.nextInt(bytes.size)] = draw.nextInt().toByte()
            }
            file.writeBytes(bytes)
            try {
                Bundle.read(folder)
            } catch (error: UserError) {
                refused++
                assertTrue('\n' !in error.message!! && error.message!!.length < 400, error.message)
            }
        }
        assertTrue(refused > 1800, "$refused")
    }
}
