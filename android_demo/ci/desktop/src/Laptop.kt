import androidx.compose.runtime.Composable
import androidx.compose.ui.ImageComposeScene
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.graphics.toComposeImageBitmap
import androidx.compose.ui.unit.Density
import androidx.compose.ui.unit.DpSize
import androidx.compose.ui.unit.dp
import androidx.compose.ui.window.WindowState
import androidx.compose.ui.window.singleWindowApplication
import java.awt.FileDialog
import java.io.File
import javax.imageio.ImageIO
import javax.swing.SwingUtilities
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.runBlocking
import org.gemmaedge.app.model.AppModel
import org.gemmaedge.app.model.BenchmarkReport
import org.gemmaedge.app.model.ChosenFiles
import org.gemmaedge.app.model.Device
import org.gemmaedge.app.model.FreeMemory
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.Platform
import org.gemmaedge.app.model.Runtimes
import org.gemmaedge.app.model.SavedPicture
import org.gemmaedge.app.screens.App
import org.gemmaedge.app.screens.ChatActions
import org.gemmaedge.app.screens.ChatScreen
import org.gemmaedge.app.screens.Frame
import org.gemmaedge.app.screens.SelfCheckScreen
import org.gemmaedge.app.screens.SystemActions
import org.gemmaedge.app.screens.Tab
import org.gemmaedge.app.screens.Theme
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.ImageDecoder
import org.gemmaedge.core.Raster
import org.gemmaedge.engines.Engines
import org.jetbrains.skia.EncodedImageFormat
import org.jetbrains.skia.Image

/**
 * `Laptop FOLDER`: the app in a window, with the models in FOLDER/bundles.
 *
 * `Laptop FOLDER MODEL FORMAT PREFIX QUESTION`: without a display. Loads, asks, runs the self-check, and draws both
 * screens to PREFIXchat.png and PREFIXself_check.png.
 */
fun main(arguments: Array<String>) {
    val laptop = Laptop(File(arguments[0]))
    val app = AppModel(laptop, Engines, CoroutineScope(SupervisorJob() + Dispatchers.Default))
    if (arguments.size < 5) {
        singleWindowApplication(WindowState(size = DpSize(412.dp, 915.dp)), title = "gemma-edge") {
            Theme { App(app, Window(app)) }
        }
        return
    }
    val (_, model, format, prefix, question) = arguments
    runBlocking {
        app.host.load(Bundle.read(File(laptop.bundles, model)), format).join()
        val load = app.host.load.value
        check(load is Load.Ready) { (load as Load.Empty).sentence.orEmpty() }
        app.chat.startNew()
        app.chat.send(question)
        val chat = app.chat.state.first { it.answer == null }
        println(chat.error ?: chat.conversation.entries.last().let { "${it.text}\n${it.numbers}" })
        draw(File("${prefix}chat.png"), Tab.CHAT) { ChatScreen(chat, load, "", {}, NoActions) }
        app.selfCheck.start()
        val checked = app.selfCheck.state.first { it.result != null || it.error != null }
        println(checked.error ?: "self-check passed: ${checked.result?.passed} (${checked.result?.reference})")
        draw(File("${prefix}self_check.png"), Tab.SELF_CHECK) { SelfCheckScreen(checked, load, busy = false, {}, {}) }
    }
}

/** All on the one thread that Compose's effects run on. */
private fun draw(file: File, tab: Tab, content: @Composable () -> Unit) {
    lateinit var scene: ImageComposeScene
    SwingUtilities.invokeAndWait {
        scene = ImageComposeScene(618, 1372, Density(1.5f)) {
            Theme(darkTheme = false) { Frame(tab, {}, tab.title) { content() } }
        }
        scene.render(0)
    }
    SwingUtilities.invokeAndWait {
        file.writeBytes(checkNotNull(scene.render(1_000_000_000).encodeToData(EncodedImageFormat.PNG)).bytes)
        scene.close()
    }
}

private object NoActions : ChatActions {
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

    override suspend fun thumbnail(picture: SavedPicture): ImageBitmap? = null
}

/** A laptop in place of the phone. Its memory is what Linux says is available. */
private class Laptop(override val root: File) : Platform {
    override val device = Device(
        "laptop", System.getProperty("os.arch"), System.getProperty("os.version"), System.getProperty("os.arch"),
        Runtime.getRuntime().availableProcessors(),
    )
    override val runtimes = Runtimes.SHIPPED
    override val decoder = ImageDecoder { bytes ->
        val image = ImageIO.read(bytes.inputStream())
        Raster(image.width, image.height, image.getRGB(0, 0, image.width, image.height, null, 0, image.width))
    }

    override fun freeMemory(): FreeMemory {
        val line = File("/proc/meminfo").readLines().first { it.startsWith("MemAvailable") }
        return FreeMemory(line.filter(Char::isDigit).toLong() * 1024, 0)
    }

    override fun freeSpace() = root.usableSpace

    override fun thermalStatus() = 0
}

/** The dialogs of the desktop. */
private class Window(private val app: AppModel) : SystemActions {
    override fun pickFolder() {
        val file = choose("Any file of the bundle's folder").firstOrNull() ?: return
        val folder = file.parentFile
        val files = folder.walk().maxDepth(2).filter(File::isFile).associateBy { it.relativeTo(folder).invariantSeparatorsPath }
        app.models.import { ChosenFiles(folder.name, files.mapValues { (_, one) -> { one.inputStream() } }) }
    }

    override fun pickFiles() {
        val files = choose("The bundle's files", several = true)
        if (files.isNotEmpty()) app.models.import { ChosenFiles("imported", files.associate { it.name to { it.inputStream() } }) }
    }

    override fun pickPicture() {
        choose("A picture").firstOrNull()?.let { file -> app.chat.attach { file.readBytes() } }
    }

    override fun share(report: BenchmarkReport) = println(report.toJson())

    override fun thumbnail(bytes: ByteArray): ImageBitmap = Image.makeFromEncoded(bytes).toComposeImageBitmap()

    private fun choose(title: String, several: Boolean = false): List<File> =
        FileDialog(null as java.awt.Frame?, title).apply {
            isMultipleMode = several
            isVisible = true
        }.files.toList()
}
