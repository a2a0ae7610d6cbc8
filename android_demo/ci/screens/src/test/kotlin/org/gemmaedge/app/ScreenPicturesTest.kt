package org.gemmaedge.app

import androidx.compose.runtime.Composable
import androidx.compose.ui.ImageComposeScene
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.graphics.toComposeImageBitmap
import androidx.compose.ui.unit.Density
import java.io.File
import java.nio.file.Files
import java.util.concurrent.FutureTask
import javax.swing.SwingUtilities
import kotlin.test.Test
import kotlin.test.assertTrue
import org.gemmaedge.app.model.AnswerNumbers
import org.gemmaedge.app.model.BenchmarkReport
import org.gemmaedge.app.model.BenchmarkState
import org.gemmaedge.app.model.ChatState
import org.gemmaedge.app.model.Entry
import org.gemmaedge.app.model.FormatRow
import org.gemmaedge.app.model.ImportProgress
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.ModelRow
import org.gemmaedge.app.model.ModelsState
import org.gemmaedge.app.model.SavedConversation
import org.gemmaedge.app.model.SavedPicture
import org.gemmaedge.app.model.SelfCheckState
import org.gemmaedge.app.screens.BenchmarkScreen
import org.gemmaedge.app.screens.ChatActions
import org.gemmaedge.app.screens.ChatScreen
import org.gemmaedge.app.screens.ConversationsScreen
import org.gemmaedge.app.screens.Frame
import org.gemmaedge.app.screens.Icons
import org.gemmaedge.app.screens.ModelsActions
import org.gemmaedge.app.screens.ModelsScreen
import org.gemmaedge.app.screens.SelfCheckScreen
import org.gemmaedge.app.screens.Tab
import org.gemmaedge.app.screens.Theme
import org.gemmaedge.app.screens.Tool
import org.gemmaedge.core.Artifact
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Measurement
import org.gemmaedge.core.MemoryBudget
import org.gemmaedge.core.Rate
import org.gemmaedge.core.Row
import org.gemmaedge.core.SelfCheckResult
import org.jetbrains.skia.Image

/** Draws every screen as it ships, for people to look at: those of the README go to pictures/, the rest to target/. */
class ScreenPicturesTest {
    private val temporary = Files.createTempDirectory("screens").toFile()
    private val bundle = Bundle.read(TestBundle.write(File(temporary, "gemma-3-4b-it-int4"), vision = true))
    private val ready = Load.Ready(bundle, "pte")
    private val numbers = AnswerNumbers(312, 6, 1.84, 169.6, 9.7, 318, 4096, 2_911_000_000)
    private val photo = SavedPicture("photo", panAndScan = false)

    private val models = listOf(
        ModelRow(
            "gemma-3-1b-it-int4", 1_530_000_000, "int4-block32+embedding-int8", 4096, vision = false,
            listOf(format("onnx", 743_000_000, 1_010_000_000), format("pte", 771_000_000, 1_120_000_000)),
        ),
        ModelRow(
            "gemma-3-4b-it-int4", 2_640_000_000, "int4-channel", 4096, vision = true,
            listOf(format("pte", 2_640_000_000, 2_900_000_000)),
        ),
        ModelRow(
            "gemma-3-12b-it-a-fine-tune-with-quite-a-long-name", 7_410_000_000, "sfp8", 8192, vision = true,
            listOf(format("pte", 7_410_000_000, 8_100_000_000)),
        ),
    )

    private val conversation = SavedConversation(
        "1",
        listOf(
            Entry(user = true, "What is on this picture?", listOf(photo)),
            Entry(user = false, "Two orange squares.", numbers = numbers),
            Entry(user = true, "Write a haiku about them."),
            Entry(
                user = false, "Two small orange squares,\nside by side on a gray field,\nwaiting for the rain.",
                numbers = numbers.copy(promptTokens = 16, newTokens = 24, firstTokenSeconds = 0.21, contextUsed = 358),
            ),
        ),
    )

    private val rows = listOf(
        Row("walk/odd-sizes", "odd sizes (12 positions)", "kl_mean", 0.000151, 0.000871, true),
        Row("walk/odd-sizes", "odd sizes (12 positions)", "kl_max", 0.000272, 0.004849, true),
        Row("walk/odd-sizes", "odd sizes (12 positions)", "top1_agreement", 1.0, null, true),
        Row("walk/one-by-one", "one by one (592 positions)", "kl_mean", 0.000134, 0.000871, true),
        Row("landmark/W", "one by one, at W (1024)", "kl_max", 0.000177, 0.004849, true),
        Row("landmark/wrap-1-of-1152-slots", "one by one, at wrap-1-of-1152-slots (1152)", "kl_max", 0.000137, 0.004849, true),
        Row("soft-tokens/image-1", "soft tokens of image 1", "soft_rms", 0.00312, 0.0101, true),
        Row("walk/chunks", "chunks (5 positions)", "kl_max", 0.000177, 0.004849, true),
        Row("walk/whole-prompt", "whole prompt (9 positions)", "kl_max", 0.000272, 0.004849, true),
        Row("reset", "odd sizes again after a reset", "max_abs", 0.0, 0.0, true),
    )

    private val report = BenchmarkReport(
        bundle = "gemma-3-1b-it-int4",
        measurements = listOf(
            Measurement("pte", 128, 32, 5, null, Rate(412.3, 6.1, 411.0), Rate(21.7, 0.4, 21.8), 0.62, 1_204_000_000, 148_000_000, 0),
            Measurement("onnx", 128, 32, 5, null, Rate(287.0, 11.9, 290.2), Rate(17.2, 0.9, 17.4), 1.31, 1_390_000_000, 152_000_000, 2),
        ),
    )

    @Test
    fun models() = draw("models", shipped = true) {
        Frame(Tab.MODELS, {}, "Models") { ModelsScreen(ModelsState(models), ready, NoModelsActions) }
    }

    @Test
    fun chat() = draw("chat", shipped = true) {
        Frame(Tab.CHAT, {}, "Chat", { tools() }) { ChatScreen(ChatState(conversation), ready, "", {}, Thumbnails) }
    }

    @Test
    fun selfCheck() = draw("self_check", shipped = true) {
        val state = SelfCheckState("gemma-3-4b-it-int4 (.pte)", result = SelfCheckResult("int8-per-token", rows, passed = true))
        Frame(Tab.SELF_CHECK, {}, "Self-check") { SelfCheckScreen(state, ready, busy = false, {}, {}) }
    }

    @Test
    fun benchmark() = draw("benchmark", shipped = true) {
        Frame(Tab.BENCHMARK, {}, "Benchmark") {
            BenchmarkScreen(BenchmarkState(reports = listOf(report)), models, busy = false, {}, {}, {})
        }
    }

    @Test
    fun conversations() = draw("conversations", shipped = true) {
        val others = listOf("Explain the sliding window of Gemma 3 to me as you would to a child of ten", "A picture")
            .mapIndexed { index, title -> SavedConversation("${index + 2}", listOf(Entry(user = true, title))) }
        Frame(Tab.CHAT, {}, "Conversations", { tools() }) { ConversationsScreen(listOf(conversation) + others, Thumbnails) {} }
    }

    @Test
    fun modelsWithTroubles() = draw("models_troubles") {
        val broken = ModelRow("broken", 12_000, problem = "model.pte has 17 bytes, its manifest says 2936448; copy the bundle again.")
        val state = ModelsState(
            listOf(broken, ModelRow("half", 1_200_000_000, unfinished = true)),
            ImportProgress("half", "model.onnx.data", 1_200_000_000, 2_640_000_000),
            "model.onnx.data has the sha256 1f8db1962224…, and the manifest says 37cb433ff21f…: it was changed or damaged; get the " +
                "bundle again from its maker.",
        )
        val sentence = "The app was ended while it loaded gemma-3-12b-it (.pte): it probably needs more memory than this phone has; " +
            "close other apps, or use a smaller model."
        Frame(Tab.MODELS, {}, "Models") { ModelsScreen(state, Load.Empty(sentence), NoModelsActions) }
    }

    @Test
    fun modelsEmptyDark() = draw("models_empty_dark", dark = true) {
        Frame(Tab.MODELS, {}, "Models") { ModelsScreen(ModelsState(), Load.Empty(), NoModelsActions) }
    }

    @Test
    fun modelsInLargeLetters() = draw("models_large", fontScale = 1.8f) {
        Frame(Tab.MODELS, {}, "Models") { ModelsScreen(ModelsState(models), Load.Loading(models[0].name, "pte"), NoModelsActions) }
    }

    @Test
    fun chatEmpty() = draw("chat_empty") {
        val saved = SavedConversation("2")
        Frame(Tab.CHAT, {}, "Chat", { tools() }) { ChatScreen(ChatState(saved), Load.Empty(), "", {}, Thumbnails) }
    }

    @Test
    fun chatAnswering() = draw("chat_answering", dark = true) {
        val asked = conversation.copy(entries = conversation.entries.take(3))
        val state = ChatState(asked, answer = "Two small orange squares,\nside by", pictures = listOf(photo, photo), panAndScan = true)
        Frame(Tab.CHAT, {}, "Chat", { tools() }) { ChatScreen(state, ready, "And then", {}, Thumbnails) }
    }

    @Test
    fun chatInLargeLettersWithError() = draw("chat_large", fontScale = 1.8f) {
        val state = ChatState(
            conversation, editing = true,
            error = "The picture begins with 25 50 44 46, not an image in JPEG, PNG, WebP, BMP or GIF; convert it.",
        )
        Frame(Tab.CHAT, {}, "Chat", { tools() }) { ChatScreen(state, ready, "Write a haiku", {}, Thumbnails) }
    }

    @Test
    fun selfCheckFailed() = draw("self_check_failed", fontScale = 1.3f) {
        val failed = rows.take(3) + Row("walk/one-by-one", "one by one (592 positions)", "kl_max", 3.41, 0.004849, false)
        val state = SelfCheckState("demo (.onnx)", result = SelfCheckResult(null, failed, passed = false))
        Frame(Tab.SELF_CHECK, {}, "Self-check") { SelfCheckScreen(state, ready, busy = false, {}, {}) }
    }

    @Test
    fun benchmarkInLargeLetters() = draw("benchmark_large", fontScale = 1.8f) {
        Frame(Tab.BENCHMARK, {}, "Benchmark") {
            BenchmarkScreen(BenchmarkState(reports = listOf(report), error = "The benchmark was stopped."), models, false, {}, {}, {})
        }
    }

    @Composable
    private fun tools() {
        Tool(Icons.History, "Conversations") {}
        Tool(Icons.Add, "New conversation") {}
    }

    private fun format(name: String, bytes: Long, peak: Long): FormatRow {
        val artifact: Artifact = bundle.artifact("pte").copy(peakMemoryEstimate = peak)
        val fit = MemoryBudget.fit(artifact, 4_600_000_000, 500_000_000)
        return FormatRow(name, bytes, fit.fits, fit.sentence)
    }

    private fun draw(
        name: String, shipped: Boolean = false, dark: Boolean = false, fontScale: Float = 1f, content: @Composable () -> Unit,
    ) {
        val folder = if (shipped) REPOSITORY.resolve("android_demo/pictures") else File("target/pictures")
        // All on the one thread that Compose's effects run on.
        val scene = onUiThread {
            ImageComposeScene((WIDTH * SCALE).toInt(), (HEIGHT * SCALE).toInt(), Density(SCALE, fontScale)) {
                Theme(dark) { content() }
            }
        }
        try {
            onUiThread { scene.render(0) }
            Thread.sleep(100) // the thumbnails are read on other threads
            onUiThread { scene.render(500_000_000) }
            val image = onUiThread { scene.render(1_000_000_000) }
            val (png, colors) = SmallPng.encode(image)
            folder.mkdirs()
            File(folder, "$name.png").writeBytes(png)
            assertTrue(png.size <= 120_000, "$name.png has ${png.size} bytes")
            assertTrue(colors > 20, "$name.png is almost empty")
        } finally {
            onUiThread { scene.close() }
            temporary.deleteRecursively()
        }
    }

    private fun <T> onUiThread(work: () -> T): T {
        val task = FutureTask(work)
        SwingUtilities.invokeLater(task)
        return task.get()
    }

    private object NoModelsActions : ModelsActions {
        override fun load(name: String, format: String) = Unit

        override fun unload() = Unit

        override fun delete(row: ModelRow) = Unit

        override fun importFolder() = Unit

        override fun importFiles() = Unit

        override fun importUrl(url: String) = Unit

        override fun stopImport() = Unit

        override fun dismiss() = Unit
    }

    private object Thumbnails : ChatActions {
        override fun send(text: String) = Unit

        override fun stop() = Unit

        override fun regenerate() = Unit

        override fun beginEdit(): String? = null

        override fun cancelEdit() = Unit

        override fun attachPicture() = Unit

        override fun detach(index: Int) = Unit

        override fun setPanAndScan(on: Boolean) = Unit

        override fun open(id: String) = Unit

        override fun delete(id: String) = Unit

        override fun dismiss() = Unit

        override suspend fun thumbnail(picture: SavedPicture): ImageBitmap {
            val file = REPOSITORY.resolve("gemma3/demo_vision/images").listFiles()!!.filter { it.isFile }.minOf { it }
            return Image.makeFromEncoded(file.readBytes()).toComposeImageBitmap()
        }
    }

    private companion object {
        const val WIDTH = 412
        const val HEIGHT = 915
        const val SCALE = 1.5f
    }
}
