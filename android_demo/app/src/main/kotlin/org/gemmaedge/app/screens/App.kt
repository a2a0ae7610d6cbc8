package org.gemmaedge.app.screens

import androidx.compose.foundation.layout.Box
import androidx.compose.foundation.layout.consumeWindowInsets
import androidx.compose.foundation.layout.imePadding
import androidx.compose.foundation.layout.padding
import androidx.compose.material3.ExperimentalMaterial3Api
import androidx.compose.material3.Icon
import androidx.compose.material3.NavigationBar
import androidx.compose.material3.NavigationBarItem
import androidx.compose.material3.Scaffold
import androidx.compose.material3.Text
import androidx.compose.material3.TopAppBar
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.collectAsState
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.remember
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.graphics.vector.ImageVector
import androidx.compose.ui.text.style.TextOverflow
import org.gemmaedge.app.model.AppModel
import org.gemmaedge.app.model.BenchmarkReport
import org.gemmaedge.app.model.ModelRow
import org.gemmaedge.app.model.SavedPicture
import org.gemmaedge.app.model.UrlSource

/** What the system does for the screens: its pickers, its sharing, its picture formats. */
interface SystemActions {
    fun pickFolder()

    fun pickFiles()

    fun pickPicture()

    fun share(report: BenchmarkReport)

    fun thumbnail(bytes: ByteArray): ImageBitmap?
}

/** The screens. [label] is short enough for large letters. */
enum class Tab(val title: String, val label: String, val icon: ImageVector) {
    MODELS("Models", "Models", Icons.Models),
    CHAT("Chat", "Chat", Icons.Chat),
    SELF_CHECK("Self-check", "Check", Icons.Check),
    BENCHMARK("Benchmark", "Speed", Icons.Speed),
}

/** The whole app. [back] lets the system's way back do what it is given, where it is enabled. */
@Composable
fun App(
    app: AppModel, system: SystemActions, back: @Composable (enabled: Boolean, onBack: () -> Unit) -> Unit = { _, _ -> },
) {
    var tab by rememberSaveable { mutableStateOf(Tab.MODELS) }
    var history by rememberSaveable { mutableStateOf(false) }
    var draft by rememberSaveable { mutableStateOf("") }
    val load by app.host.load.collectAsState()
    val busy by remember(app) { app.host.busy }.collectAsState(false)
    val models by app.models.state.collectAsState()
    val chat by app.chat.state.collectAsState()
    LaunchedEffect(tab, load) { app.models.refresh() }
    LaunchedEffect(history, chat.conversation.id) { app.chat.refresh() }
    val chatActions = remember(app, system) { chatActions(app, system) }
    back(tab == Tab.CHAT && history) { history = false }
    Frame(
        tab,
        onTab = {
            tab = it
            history = false
        },
        title = if (tab == Tab.CHAT && history) "Conversations" else tab.title,
        tools = {
            if (tab == Tab.CHAT) {
                Tool(if (history) Icons.Close else Icons.History, if (history) "Back to the chat" else "Conversations") {
                    history = !history
                }
                Tool(Icons.Add, "New conversation") {
                    app.chat.startNew()
                    history = false
                }
            }
        },
    ) {
        when (tab) {
            Tab.MODELS -> ModelsScreen(models, load, remember(app, system) { modelsActions(app, system) })
            Tab.CHAT -> if (history) {
                ConversationsScreen(chat.saved, chatActions) { history = false }
            } else {
                ChatScreen(chat, load, draft, { draft = it }, chatActions)
            }
            Tab.SELF_CHECK -> {
                val state by app.selfCheck.state.collectAsState()
                SelfCheckScreen(state, load, busy, app.selfCheck::start, app.selfCheck::stop)
            }
            Tab.BENCHMARK -> {
                val state by app.benchmark.state.collectAsState()
                BenchmarkScreen(
                    state, models.rows, busy, { app.benchmark.start(it) }, app.benchmark::stop, system::share,
                )
            }
        }
    }
}

/** The bars around every screen. */
@OptIn(ExperimentalMaterial3Api::class)
@Composable
fun Frame(
    tab: Tab, onTab: (Tab) -> Unit, title: String, tools: @Composable () -> Unit = {}, content: @Composable () -> Unit,
) = Scaffold(
    topBar = { TopAppBar({ Text(title, maxLines = 1, overflow = TextOverflow.Ellipsis) }, actions = { tools() }) },
    bottomBar = {
        NavigationBar {
            for (one in Tab.entries) {
                NavigationBarItem(
                    selected = one == tab,
                    onClick = { onTab(one) },
                    icon = { Icon(one.icon, contentDescription = null) },
                    label = { Text(one.label, maxLines = 1) },
                )
            }
        }
    },
) { padding ->
    Box(Modifier.padding(padding).consumeWindowInsets(padding).imePadding()) { content() }
}

private fun modelsActions(app: AppModel, system: SystemActions) = object : ModelsActions {
    override fun load(name: String, format: String) {
        app.models.load(name, format)
    }

    override fun unload() {
        app.host.unload()
    }

    override fun delete(row: ModelRow) {
        app.models.delete(row)
    }

    override fun importFolder() = system.pickFolder()

    override fun importFiles() = system.pickFiles()

    override fun importUrl(url: String) = app.models.import { UrlSource(url) }

    override fun stopImport() = app.models.stopImport()

    override fun dismiss() = app.models.dismiss()
}

private fun chatActions(app: AppModel, system: SystemActions) = object : ChatActions {
    override fun send(text: String) = app.chat.send(text)

    override fun stop() = app.chat.stop()

    override fun regenerate() = app.chat.regenerate()

    override fun beginEdit() = app.chat.beginEdit()

    override fun cancelEdit() = app.chat.cancelEdit()

    override fun attachPicture() = system.pickPicture()

    override fun detach(index: Int) = app.chat.detach(index)

    override fun setPanAndScan(on: Boolean) = app.chat.setPanAndScan(on)

    override fun open(id: String) {
        app.chat.open(id)
    }

    override fun delete(id: String) {
        app.chat.delete(id)
    }

    override fun dismiss() = app.chat.dismiss()

    override suspend fun thumbnail(picture: SavedPicture) = app.chat.thumbnail(picture, system::thumbnail)
}
