package org.gemmaedge.app

import java.io.File
import java.nio.file.Files
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertIs
import kotlin.test.assertNotEquals
import kotlin.test.assertNotNull
import kotlin.test.assertNull
import kotlin.test.assertTrue
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import org.gemmaedge.app.model.AppModel
import org.gemmaedge.app.model.BenchmarkRequest
import org.gemmaedge.app.model.ChatState
import org.gemmaedge.app.model.ChosenFiles
import org.gemmaedge.app.model.FreeMemory
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.Runtimes
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Call

/** What the app does, on a fake engine. */
class AppModelTest {
    private val folder = Files.createTempDirectory("app").toFile()
    private val platform = FakePlatform(folder)
    private val engines = FakeEngines()
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.Default)
    private val red = REPOSITORY.resolve("gemma3/demo_vision/images").listFiles()!!.first { it.extension == "png" }.readBytes()

    init {
        TestBundle.write(File(platform.bundles, "text"))
        TestBundle.write(File(platform.bundles, "seeing"), vision = true)
    }

    private var app = AppModel(platform, engines, scope)

    @AfterTest
    fun stop() {
        scope.cancel()
        folder.deleteRecursively()
    }

    private fun <T> StateFlow<T>.await(what: (T) -> Boolean): T = runBlocking { withTimeout(20_000) { first(what) } }

    private fun loaded(name: String = "text"): Load.Ready {
        app.models.load(name, "pte")
        return assertIs<Load.Ready>(app.host.load.await { it is Load.Ready && it.name == name || it is Load.Empty && it.sentence != null })
    }

    /** Waits for the end of an answer. */
    private fun idle(): ChatState = app.chat.state.await { it.answer == null }

    private fun texts() = idle().conversation.entries.map { it.text }

    @Test
    fun `nothing is loaded without a tap, and one thread does all the work`() {
        assertEquals(Load.Empty(), app.host.load.value)
        loaded()
        app.chat.send("Hi")
        assertEquals(listOf("Hi", "Hello from the phone."), texts())
        assertTrue(engines.threads.single().name.startsWith("engine"))
        assertFalse(File(folder, "loading").exists())
    }

    @Test
    fun `lists what is there and whether it fits`() {
        File(platform.bundles, ".half.part").mkdirs()
        File(platform.bundles, ".hidden").mkdirs()
        TestBundle.write(File(platform.bundles, "cut")).resolve("model.pte").writeBytes(ByteArray(3))
        platform.free = FreeMemory(1_000_000_000, 100_000_000)
        runBlocking { app.models.refresh().join() }
        val rows = app.models.state.value.rows.associateBy { it.name }
        assertEquals(setOf("half", "cut", "seeing", "text"), rows.keys)
        assertTrue(rows.getValue("half").unfinished)
        assertContains(rows.getValue("cut").problem!!, "model.pte has 3 bytes")
        assertTrue(rows.getValue("text").formats.none { it.fits })
        assertContains(rows.getValue("text").formats.first().sentence, "It does not fit")
    }

    @Test
    fun `a model that does not fit is not opened`() {
        platform.free = FreeMemory(1_000_000_000, 0)
        app.models.load("text", "pte")
        val failed = app.host.load.await { it is Load.Empty && it.sentence != null }
        assertContains((failed as Load.Empty).sentence!!, "It does not fit")
        assertTrue(engines.opened.isEmpty())
    }

    @Test
    fun `a load that ends the app is told once, at the next start`() {
        val seen = mutableListOf<Boolean>()
        engines.beforeFeed = { seen += File(folder, "loading").exists() }
        loaded()
        assertEquals(listOf(true), seen) // the first call belongs to loading
        File(folder, "loading").writeText("text (.pte)")
        val next = AppModel(platform, engines, scope)
        assertContains((next.host.load.value as Load.Empty).sentence!!, "was ended while it loaded text (.pte)")
        assertEquals(Load.Empty(), AppModel(platform, engines, scope).host.load.value)
    }

    @Test
    fun `a load that fails is a sentence and leaves no marker`() {
        engines.beforeFeed = { throw BadInput("model.pte: ExecuTorch does not load it; export the bundle again") }
        app.models.load("text", "pte")
        val failed = app.host.load.await { it is Load.Empty && it.sentence != null }
        assertEquals("model.pte: ExecuTorch does not load it; export the bundle again.", (failed as Load.Empty).sentence)
        assertFalse(File(folder, "loading").exists())
        assertTrue(engines.opened.single().closed)
    }

    @Test
    fun `another model takes the place of the first`() {
        loaded("text")
        app.models.load("seeing", "onnx")
        app.host.load.await { it is Load.Ready && it.name == "seeing" }
        assertEquals(listOf(true, false), engines.opened.map { it.closed })
    }

    @Test
    fun `memory pressure lets the model go, also in the middle of an answer`() {
        loaded()
        engines.beforeFeed = { if (it.length == 1) app.onLowMemory() }
        app.chat.send("Hi")
        val gone = app.host.load.await { it is Load.Empty } as Load.Empty
        assertContains(gone.sentence!!, "to free the phone's memory")
        assertTrue(engines.opened.single().closed)
        assertEquals("Stopped.", idle().conversation.entries.last().note)
    }

    @Test
    fun `stop ends an answer between tokens, and what was said stays`() {
        loaded()
        engines.beforeFeed = { if (it.length == 1) app.chat.stop() }
        app.chat.send("Hi")
        val last = idle().conversation.entries.last()
        assertEquals("Stopped.", last.note)
        assertTrue(last.text.length < "Hello from the phone.".length)
        engines.beforeFeed = {}
        app.chat.regenerate()
        app.chat.state.await { it.answer != null || it.conversation.entries.last().note == null }
        assertEquals(listOf("Hi", "Hello from the phone."), texts())
    }

    @Test
    fun `an edit replaces the last message and its answer`() {
        loaded()
        app.chat.send("One")
        idle()
        app.chat.send("Two")
        idle()
        assertEquals("Two", app.chat.beginEdit())
        app.chat.send("Three")
        assertEquals(listOf("One", "Hello from the phone.", "Three", "Hello from the phone."), texts())
        assertFalse(app.chat.state.value.editing)
    }

    @Test
    fun `a conversation is there again after the process ended`() {
        loaded()
        app.chat.send("Remember")
        idle()
        app = AppModel(platform, engines, scope)
        assertEquals(listOf("Remember", "Hello from the phone."), texts())
        loaded()
        val fed = mutableListOf<Call>()
        engines.beforeFeed = { fed += it }
        app.chat.send("More")
        assertEquals(4, texts().size)
        val ids = fed.filterIsInstance<Call.Text>().flatMap { it.ids.toList() }
        val before = assertIs<Load.Ready>(app.host.load.value).bundle.tokenizer.encode("Remember", bos = false).toList()
        assertTrue(ids.windowed(before.size).any { it == before }, "the restored turn is fed again")
    }

    @Test
    fun `the self-check in between does not mix into the conversation`() {
        loaded()
        app.chat.send("One")
        idle()
        app.selfCheck.start()
        val checked = app.selfCheck.state.await { it.error != null || it.result != null }
        assertContains(checked.error!!, "proof/golden.safetensors") // this bundle has no proof
        app.chat.send("Two")
        assertEquals(4, texts().size)
        val engine = engines.opened.single()
        assertTrue(engine.position > 30, "both turns are in the caches: ${engine.position}")
    }

    @Test
    fun `conversations are listed, opened and deleted`() {
        loaded()
        app.chat.send("First")
        val first = idle().conversation.id
        Thread.sleep(5)
        app.chat.startNew()
        assertTrue(texts().isEmpty())
        app.chat.send("Second")
        assertNotEquals(first, idle().conversation.id)
        runBlocking { app.chat.refresh().join() }
        assertEquals(setOf("First", "Second"), app.chat.state.value.saved.map { it.title }.toSet())
        runBlocking { app.chat.open(first).join() }
        assertEquals("First", texts().first())
        app.chat.send("Third")
        assertEquals(4, texts().size)
        runBlocking { app.chat.delete(first).join() }
        assertTrue(texts().isEmpty())
        assertEquals(listOf("Second"), app.chat.state.value.saved.map { it.title })
    }

    @Test
    fun `pictures are kept with the conversation`() {
        loaded("seeing")
        app.chat.setPanAndScan(true)
        runBlocking { app.chat.attach { red }.join() }
        assertEquals(true, app.chat.state.value.pictures.single().panAndScan)
        app.chat.send("What is it?")
        val entry = idle().conversation.entries.first()
        assertNull(app.chat.state.value.error)
        assertTrue(runBlocking { app.chat.thumbnail(entry.pictures.single()) { it } }.contentEquals(red))
    }

    @Test
    fun `what is no picture is refused at once`() {
        loaded("seeing")
        runBlocking { app.chat.attach { "%PDF-1.7 and more".toByteArray() }.join() }
        assertContains(app.chat.state.value.error!!, "The picture begins with 25 50 44 46")
        assertTrue(app.chat.state.value.pictures.isEmpty())
        loaded("text")
        runBlocking { app.chat.attach { red }.join() }
        assertContains(app.chat.state.value.error!!, "takes no pictures")
    }

    @Test
    fun `an error of the runtime is a sentence, and the message stays to be sent again`() {
        loaded()
        engines.beforeFeed = { throw IllegalStateException("Error 18") }
        app.chat.send("Hi")
        assertContains(app.chat.state.await { it.error != null }.error!!, "IllegalStateException Error 18")
        engines.beforeFeed = {}
        app.chat.regenerate()
        app.chat.state.await { it.conversation.entries.size == 2 }
        assertEquals(listOf("Hi", "Hello from the phone."), texts())
    }

    @Test
    fun `a message that was never answered gives way to the next one, also after a restart`() {
        loaded()
        app.chat.send("One")
        idle()
        app.chat.send("a ".repeat(600))
        assertContains(app.chat.state.await { it.error != null }.error!!, "over the context of 512")
        app.chat.send("Two")
        assertEquals(listOf("One", "Hello from the phone.", "Two", "Hello from the phone."), texts())
        val position = engines.opened.single().position
        app.chat.regenerate()
        assertEquals(4, texts().size)
        assertEquals(position, engines.opened.single().position, "the turn is there once")
        app = AppModel(platform, engines, scope)
        loaded()
        app.chat.send("Three")
        assertEquals(6, texts().size)
        assertNull(app.chat.state.value.error)
    }

    @Test
    fun `a conversation that is deleted while it is answered does not come back`() {
        loaded()
        val (reached, goOn) = Pair(CountDownLatch(1), CountDownLatch(1))
        engines.beforeFeed = {
            if (it.length == 1) {
                reached.countDown()
                goOn.await(20, TimeUnit.SECONDS)
            }
        }
        app.chat.send("Forget this")
        assertTrue(reached.await(20, TimeUnit.SECONDS))
        val id = app.chat.state.value.conversation.id
        val deleted = app.chat.delete(id)
        app.chat.state.await { it.conversation.id != id }
        goOn.countDown()
        runBlocking {
            deleted.join()
            app.host.unload().join() // whatever the engine's thread still had to do is done
        }
        assertFalse(File(platform.conversations, id).exists())
        assertTrue(app.chat.state.value.saved.isEmpty())
        assertNotEquals(id, File(platform.conversations, "current").readText())
    }

    @Test
    fun `an answer that cannot be saved stays on the screen`() {
        loaded()
        engines.beforeFeed = {
            val file = File(platform.conversations, "${app.chat.state.value.conversation.id}/conversation.json")
            if (it.length == 1 && file.delete()) File(file, "in the way").mkdirs()
        }
        app.chat.send("Hi")
        assertEquals(listOf("Hi", "Hello from the phone."), texts())
        assertContains(app.chat.state.value.error!!, "conversation.json cannot be written")
    }

    @Test
    fun `the app starts whatever its own files hold`() {
        loaded()
        app.chat.send("Hi")
        val id = idle().conversation.id
        val file = File(platform.conversations, "$id/conversation.json")
        val whole = file.readText()
        val nonsense = listOf("", "{", whole.dropLast(20), "[1]", "null", "\u0000", "[".repeat(100_000), "{\"id\":1,\"entries\":{}}")
        for (text in nonsense) {
            file.writeText(text)
            val next = AppModel(platform, engines, scope)
            assertTrue(next.chat.state.value.conversation.entries.isEmpty(), text.take(20))
            runBlocking { next.chat.open(id).join() }
            assertContains(next.chat.state.value.error!!, "cannot be read")
            runBlocking { next.chat.refresh().join() }
            assertTrue(next.chat.state.value.saved.isEmpty())
            File(platform.conversations, "current").writeText(id)
        }
        file.writeText(whole.replaceFirst("{", "{\"of a later version\":[{}],"))
        assertEquals("Hi", AppModel(platform, engines, scope).chat.state.value.conversation.title)
        for (text in listOf("", "\u0000", "../bundles", "gone")) {
            File(platform.conversations, "current").writeText(text)
            assertTrue(AppModel(platform, engines, scope).chat.state.value.conversation.entries.isEmpty())
        }
        File(folder, "loading/inside").mkdirs()
        assertContains((AppModel(platform, engines, scope).host.load.value as Load.Empty).sentence!!, "was ended while it loaded")
    }

    @Test
    fun `a full context says so`() {
        loaded()
        app.chat.send("a ".repeat(600))
        assertContains(app.chat.state.await { it.error != null }.error!!, "over the context of 512")
    }

    @Test
    fun `a message without a model says so`() {
        app.chat.send("Hi")
        assertContains(app.chat.state.await { it.error != null }.error!!, "No model is in memory")
    }

    @Test
    fun `a benchmark writes what the laptop reads`() {
        loaded()
        runBlocking { app.benchmark.start(BenchmarkRequest("text", "onnx", 40, 3, 2), "run-1").join() }
        val report = Json.parseToJsonElement(File(platform.benchmarks, "run-1.json").readText()).jsonObject
        assertEquals(setOf("schema_version", "bundle", "device", "measurements"), report.keys)
        val keys = "format prompt new_tokens repetitions threads prefill decode load_seconds peak_rss_bytes " +
            "libraries_rss_bytes thermal_status"
        assertEquals(keys.split(" ").toSet(), report.getValue("measurements").jsonArray.single().jsonObject.keys)
        assertEquals(setOf("model", "soc", "android", "abi", "cores"), report.getValue("device").jsonObject.keys)
        assertEquals("1", report.getValue("measurements").jsonArray.single().jsonObject.getValue("thermal_status").toString())
        assertEquals(listOf("run-1.json"), platform.benchmarks.list()!!.toList())
        assertTrue(engines.opened.all { it.closed }) // the chat's model made room
        assertEquals("text", app.benchmark.state.value.reports.single().bundle)
    }

    @Test
    fun `a benchmark's error reaches the laptop`() {
        for ((request, words) in listOf(
            BenchmarkRequest("../text", "onnx") to "no model named ../text",
            BenchmarkRequest("gone", "onnx") to "no model named gone",
            BenchmarkRequest("text", "gguf") to "the bundle has no .gguf".replaceFirstChar(Char::uppercase),
            BenchmarkRequest("text", "onnx", prompt = 600) to "over the bundle's context of 512",
            BenchmarkRequest("text", "onnx", repetitions = 0) to "repetitions is 0",
        )) {
            runBlocking { app.benchmark.start(request, "run").join() }
            val report = Json.parseToJsonElement(File(platform.benchmarks, "run.json").readText()).jsonObject
            assertEquals(setOf("schema_version", "error"), report.keys)
            assertContains(report.getValue("error").toString(), words)
        }
        runBlocking { app.benchmark.start(BenchmarkRequest("text", "onnx", 4, 2, 1), "../x").join() }
        assertContains(assertNotNull(app.benchmark.state.value.error), "is no report's name")
    }

    @Test
    fun `a benchmark can be stopped`() {
        engines.beforeFeed = { app.benchmark.stop() }
        runBlocking { app.benchmark.start(BenchmarkRequest("text", "onnx", 40, 3, 2)).join() }
        assertEquals("The benchmark was stopped.", app.benchmark.state.value.error)
    }

    @Test
    fun `deleting lets the model go first`() {
        loaded()
        runBlocking {
            app.models.refresh().join()
            app.models.delete(app.models.state.value.rows.single { it.name == "text" }).join()
        }
        assertEquals(Load.Empty(), app.host.load.value)
        assertEquals(listOf("seeing"), platform.bundles.list()!!.toList())
    }

    @Test
    fun `an import shows its end, and can be stopped while it waits`() {
        val origin = TestBundle.write(File(folder, "new"))
        val files = origin.walk().filter(File::isFile).associate { it.relativeTo(origin).path to { it.inputStream() } }
        app.models.import { ChosenFiles("new", files) }
        val done = app.models.state.await { it.message != null }
        assertContains(done.message!!, "new is here")
        assertTrue(done.rows.any { it.name == "new" })
        val reached = CountDownLatch(1)
        app.models.import {
            reached.countDown()
            Thread.sleep(300)
            ChosenFiles("other", files)
        }
        assertTrue(reached.await(20, TimeUnit.SECONDS))
        app.models.stopImport()
        assertContains(app.models.state.await { it.message != null && it.progress == null }.message!!, "stopped")
        assertTrue(platform.bundles.list()!!.none { "other" in it })
    }

    @Test
    fun `the versions are those of the build`() {
        val catalog = REPOSITORY.resolve("android_demo/gradle/libs.versions.toml").readLines()
        assertContains(catalog, "executorch = \"${Runtimes.EXECUTORCH}\"")
        assertContains(catalog, "onnxruntime = \"${Runtimes.ONNXRUNTIME}\"")
    }
}
