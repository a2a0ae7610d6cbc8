package org.gemmaedge.app

import com.sun.net.httpserver.HttpExchange
import com.sun.net.httpserver.HttpServer
import java.io.File
import java.io.IOException
import java.net.InetAddress
import java.net.InetSocketAddress
import java.nio.file.Files
import java.time.Duration
import java.util.concurrent.CountDownLatch
import java.util.concurrent.Executors
import java.util.concurrent.TimeUnit
import java.util.zip.GZIPOutputStream
import kotlin.coroutines.cancellation.CancellationException
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import org.gemmaedge.app.model.BundleImport
import org.gemmaedge.app.model.BundleSource
import org.gemmaedge.app.model.ChosenFiles
import org.gemmaedge.app.model.UrlSource
import org.gemmaedge.app.model.sentence
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.DoesNotFit
import org.gemmaedge.core.VerificationFailed
import org.junit.jupiter.api.Assertions.assertTimeoutPreemptively

class BundleImportTest {
    private val folder = Files.createTempDirectory("import").toFile()
    private val bundles = File(folder, "bundles")
    private val platform = FakePlatform(folder)
    private val origin = TestBundle.write(File(folder, "origin"))
    private val server = HttpServer.create(InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0)
    private val threads = Executors.newCachedThreadPool()
    private val end = CountDownLatch(1)
    private val asked = mutableListOf<String>()

    /** What the server does for a path, instead of sending the file. */
    private val tricks = HashMap<String, (HttpExchange) -> Unit>()
    private var ranges = true

    init {
        server.executor = threads
        server.createContext("/") { exchange -> exchange.use { serve(it) } }
        server.start()
    }

    @AfterTest
    fun stop() {
        end.countDown()
        server.stop(0)
        threads.shutdownNow()
        folder.deleteRecursively()
    }

    private fun HttpExchange.use(serve: (HttpExchange) -> Unit) = try {
        serve(this)
    } catch (_: IOException) {
        // The client is gone.
    } finally {
        close()
    }

    private fun serve(exchange: HttpExchange) {
        val path = exchange.requestURI.path.removePrefix("/origin/")
        val range = exchange.requestHeaders.getFirst("Range")
        synchronized(asked) { asked += if (range == null) path else "$path $range" }
        tricks[path]?.let { return it(exchange) }
        val file = File(origin, path)
        if (!file.isFile) return exchange.sendResponseHeaders(404, -1)
        val bytes = file.readBytes()
        val start = if (ranges && range != null) range.removePrefix("bytes=").removeSuffix("-").toInt() else 0
        if (start > 0) exchange.responseHeaders.add("Content-Range", "bytes $start-${bytes.size - 1}/${bytes.size}")
        exchange.sendResponseHeaders(if (start > 0) 206 else 200, bytes.size.toLong() - start)
        exchange.responseBody.write(bytes, start, bytes.size - start)
    }

    private fun url(path: String = "origin") =
        UrlSource("http://127.0.0.1:${server.address.port}/$path", httpsOnly = false, timeoutMilliseconds = 400)

    private fun chosen(files: Map<String, File> = relative(origin)) =
        ChosenFiles("origin", files.mapValues { (_, file) -> { file.inputStream() } })

    private fun relative(root: File) = root.walk().filter(File::isFile).associateBy { it.relativeTo(root).path }

    private fun import(source: BundleSource, cancelled: () -> Boolean = { false }): String =
        BundleImport(bundles, platform.runtimes, platform::freeSpace).run(source, cancelled) {}

    /** The import fails with one sentence that has all of [words], and leaves [left]. */
    private inline fun <reified T : Throwable> fails(
        source: BundleSource, vararg words: String, left: List<String> = emptyList(), noinline cancelled: () -> Boolean = { false },
    ) {
        val error = assertFailsWith<T> { import(source, cancelled) }
        for (word in words) assertContains(sentence(error), word)
        assertTrue('\n' !in sentence(error))
        assertEquals(left, bundles.list().orEmpty().toList())
    }

    private fun cutShort(file: String, bytes: Int) {
        tricks[file] = { exchange ->
            val all = File(origin, file).readBytes()
            exchange.sendResponseHeaders(200, all.size.toLong())
            exchange.responseBody.write(all, 0, bytes)
            exchange.responseBody.flush()
        }
    }

    @Test
    fun `files of a folder arrive and are a bundle`() {
        assertEquals("origin", import(chosen()))
        Bundle.verify(Bundle.read(File(bundles, "origin")))
        assertEquals(listOf("origin"), bundles.list()!!.toList())
    }

    @Test
    fun `files without their folders are found by name`() {
        import(chosen(relative(origin).mapKeys { it.key.substringAfterLast('/') }))
        assertTrue(File(bundles, "origin/proof/plan.json").isFile)
    }

    @Test
    fun `files that the manifest does not list are not taken`() {
        File(origin, "extra.sh").writeText("x")
        import(chosen())
        assertTrue(!File(bundles, "origin/extra.sh").exists())
    }

    @Test
    fun `an address gives the same bundle`() {
        assertEquals("origin", import(url()))
        Bundle.verify(Bundle.read(File(bundles, "origin")))
        assertEquals("manifest.json", asked.first())
    }

    @Test
    fun `a download that was cut short goes on where it stopped`() {
        cutShort("model.pte", 3000)
        fails<IOException>(url(), "try again", left = listOf(".origin.part"))
        tricks.clear()
        asked.clear()
        import(url())
        assertEquals(listOf("manifest.json", "model.pte bytes=3000-", "proof/plan.json", "tokenizer.model"), asked)
        Bundle.verify(Bundle.read(File(bundles, "origin")))
    }

    @Test
    fun `a server that forgets a file does not cost what is there`() {
        tricks["model.pte"] = { it.sendResponseHeaders(404, -1) }
        fails<BadInput>(url(), "has no model.pte", left = listOf(".origin.part"))
        tricks.clear()
        asked.clear()
        import(url())
        assertEquals(listOf("manifest.json", "model.pte", "proof/plan.json", "tokenizer.model"), asked)
    }

    @Test
    fun `a server without ranges sends the file again`() {
        cutShort("model.pte", 3000)
        fails<IOException>(url(), "try again", left = listOf(".origin.part"))
        tricks.clear()
        ranges = false
        import(url())
        Bundle.verify(Bundle.read(File(bundles, "origin")))
    }

    @Test
    fun `a file that changed while the download rested is found out`() {
        cutShort("model.pte", 3000)
        fails<IOException>(url(), "try again", left = listOf(".origin.part"))
        tricks.clear()
        File(origin, "model.pte").writeBytes(ByteArray(5001) { 3 })
        fails<VerificationFailed>(url(), "model.pte has the sha256", "get the bundle again")
    }

    @Test
    fun `a server that lies about ranges is refused, and what is there stays`() {
        cutShort("model.pte", 3000)
        fails<IOException>(url(), "try again", left = listOf(".origin.part"))
        val ranges = mapOf("bytes 10-5000/5001" to "from byte 10, not 3000", "3000-" to "without its range")
        for ((range, words) in ranges) {
            tricks["model.pte"] = { exchange ->
                exchange.responseHeaders.add("Content-Range", range)
                exchange.sendResponseHeaders(206, 2001)
                exchange.responseBody.write(ByteArray(2001))
            }
            fails<BadInput>(url(), words, left = listOf(".origin.part"))
        }
        tricks["model.pte"] = { exchange -> // the whole file, under the header of its rest
            exchange.responseHeaders.add("Content-Range", "bytes 3000-5000/5001")
            exchange.sendResponseHeaders(206, 0)
            exchange.responseBody.write(File(origin, "model.pte").readBytes())
        }
        fails<VerificationFailed>(url(), "model.pte has more than the 5001 bytes")
    }

    @Test
    fun `a server that refuses the rest sends the file again`() {
        cutShort("model.pte", 3000)
        fails<IOException>(url(), "try again", left = listOf(".origin.part"))
        tricks["model.pte"] = { exchange ->
            val bytes = File(origin, "model.pte").readBytes()
            val part = exchange.requestHeaders.getFirst("Range") != null
            exchange.sendResponseHeaders(if (part) 416 else 200, if (part) -1 else bytes.size.toLong())
            if (!part) exchange.responseBody.write(bytes)
        }
        import(url())
        Bundle.verify(Bundle.read(File(bundles, "origin")))
    }

    @Test
    fun `bodies without end are cut off`() {
        fun endless(exchange: HttpExchange) {
            exchange.sendResponseHeaders(200, 0)
            val spaces = ByteArray(1 shl 16) { ' '.code.toByte() }
            while (end.count > 0) exchange.responseBody.write(spaces)
        }
        tricks["model.onnx"] = ::endless
        fails<VerificationFailed>(url(), "model.onnx has more than the 5000 bytes")
        tricks["manifest.json"] = ::endless
        fails<BadInput>(url(), "it is not a bundle's")
    }

    @Test
    fun `a manifest that trickles can be stopped`() {
        tricks["manifest.json"] = { exchange ->
            exchange.sendResponseHeaders(200, 0)
            while (!end.await(10, TimeUnit.MILLISECONDS)) {
                exchange.responseBody.write(' '.code)
                exchange.responseBody.flush()
            }
        }
        var calls = 0
        assertTimeoutPreemptively(Duration.ofSeconds(20)) {
            fails<CancellationException>(url(), cancelled = { ++calls > 3 })
        }
    }

    @Test
    fun `a server that compresses, though asked not to, is refused`() {
        tricks["model.onnx"] = { exchange ->
            exchange.responseHeaders.add("Content-Encoding", "gzip")
            exchange.sendResponseHeaders(200, 0)
            GZIPOutputStream(exchange.responseBody).use { it.write(File(origin, "model.onnx").readBytes()) }
        }
        fails<BadInput>(url(), "sends model.onnx compressed (gzip); use another server")
    }

    @Test
    fun `a server that stalls`() {
        tricks["model.onnx"] = { exchange ->
            exchange.sendResponseHeaders(200, 5000)
            exchange.responseBody.write(ByteArray(100))
            exchange.responseBody.flush()
            end.await()
        }
        fails<IOException>(url(), "model.onnx stalls", left = listOf(".origin.part"))
    }

    @Test
    fun `a file of another length`() {
        File(origin, "model.pte").appendBytes(ByteArray(9))
        fails<VerificationFailed>(url(), "model.pte has more than the 5001 bytes")
        fails<VerificationFailed>(chosen(), "model.pte has more than the 5001 bytes")
        File(origin, "model.pte").writeBytes(ByteArray(9))
        fails<VerificationFailed>(url(), "model.pte has 9 bytes, not the 5001")
    }

    @Test
    fun `a hash that lies`() {
        File(origin, "model.onnx").writeBytes(ByteArray(5000) { 1 })
        fails<VerificationFailed>(url(), "model.onnx has the sha256", "the manifest says")
        fails<VerificationFailed>(chosen(), "model.onnx has the sha256")
    }

    @Test
    fun `redirects are followed, but not for ever`() {
        tricks["model.onnx"] = { exchange ->
            exchange.responseHeaders.add("Location", "/origin/moved.onnx")
            exchange.sendResponseHeaders(302, -1)
        }
        File(origin, "model.onnx").copyTo(File(origin, "moved.onnx"))
        import(url())
        bundles.deleteRecursively()
        tricks["moved.onnx"] = tricks.getValue("model.onnx")
        fails<BadInput>(url(), "redirects more than 5 times")
    }

    @Test
    fun `a redirect to another protocol is refused`() {
        tricks["model.onnx"] = { exchange ->
            exchange.responseHeaders.add("Location", "file:///etc/passwd")
            exchange.sendResponseHeaders(302, -1)
        }
        fails<BadInput>(url(), "does not begin with https://")
    }

    @Test
    fun `addresses that are none`() {
        for (text in listOf("", "bundle", "https://", "ftp://example.org/bundle", "http://example.org/bundle", "https://a b")) {
            assertFailsWith<BadInput>(text) { UrlSource(text) }
        }
        assertEquals("bundle", UrlSource("https://example.org/some/bundle/manifest.json").name)
        fails<BadInput>(url("elsewhere"), "has no manifest.json (it answers 404)")
        tricks["manifest.json"] = { it.sendResponseHeaders(503, -1) }
        fails<IOException>(url(), "answers 503")
    }

    @Test
    fun `a stopped import leaves nothing of chosen files, and what is there of a download`() {
        var calls = 0
        fails<CancellationException>(chosen(), cancelled = { ++calls > 2 })
        calls = 0
        fails<CancellationException>(url(), left = listOf(".origin.part"), cancelled = { ++calls > 2 })
        import(url())
    }

    @Test
    fun `no room`() {
        platform.space = 4000
        fails<DoesNotFit>(chosen(), "takes 72 kB of storage, and 4 kB are free; make room first")
    }

    @Test
    fun `a newer schema, a newer runtime, and no bundle at all`() {
        TestBundle.write(origin, schema = "5.0")
        fails<BadInput>(chosen(), "5.0", "this app reads 4.x")
        File(origin, "manifest.json").writeText("{")
        fails<BadInput>(chosen(), "manifest.json is damaged")
        fails<BadInput>(chosen(emptyMap()), "manifest.json is not among the chosen files")
    }

    @Test
    fun `a bundle for another runtime version only`() {
        TestBundle.write(origin, executorch = "1.6.0") { it.replace(Regex(""""onnx": \{"file".*?\}\]\}\},""", RegexOption.DOT_MATCHES_ALL), "") }
        fails<BadInput>(chosen(), "the .pte is for ExecuTorch 1.6.0, and this app has 1.5.1".replaceFirstChar(Char::uppercase))
    }

    @Test
    fun `names outside the folder`() {
        for (name in listOf("../model.pte", "/model.pte", "a/b/model.pte", ".model", "other/model.pte", "proof/../../x")) {
            TestBundle.write(origin) { it.replace(""""files": {""", """"files": {"$name": {"size": 1, "sha256": "00"}, """) }
            fails<BadInput>(chosen(), "which no bundle has")
        }
    }

    @Test
    fun `a model of the same name stays`() {
        import(chosen())
        fails<BadInput>(chosen(), "has a model named origin already", left = listOf("origin"))
    }

    @Test
    fun `names are made safe for adb's shell`() {
        assertEquals("my-model-1.0", BundleImport.safeName("my model (1.0"))
        assertEquals("model", BundleImport.safeName("../.."))
        assertEquals("x", BundleImport.safeName(".x"))
        assertEquals("a".repeat(59), BundleImport.safeName("a".repeat(59) + "-b"))
    }
}
