package org.gemmaedge.app.screens

import androidx.compose.foundation.Image
import androidx.compose.foundation.background
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Box
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.FlowRow
import androidx.compose.foundation.layout.PaddingValues
import androidx.compose.foundation.layout.Row
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.layout.size
import androidx.compose.foundation.layout.widthIn
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.itemsIndexed
import androidx.compose.foundation.lazy.rememberLazyListState
import androidx.compose.foundation.selection.toggleable
import androidx.compose.foundation.shape.RoundedCornerShape
import androidx.compose.foundation.text.selection.SelectionContainer
import androidx.compose.material3.Card
import androidx.compose.material3.FilledIconButton
import androidx.compose.material3.Icon
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Surface
import androidx.compose.material3.Switch
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.produceState
import androidx.compose.runtime.remember
import androidx.compose.runtime.setValue
import androidx.compose.runtime.snapshotFlow
import androidx.compose.ui.Alignment
import androidx.compose.ui.Modifier
import androidx.compose.ui.draw.clip
import androidx.compose.ui.graphics.ImageBitmap
import androidx.compose.ui.layout.ContentScale
import androidx.compose.ui.semantics.Role
import androidx.compose.ui.semantics.contentDescription
import androidx.compose.ui.semantics.semantics
import androidx.compose.ui.text.style.TextOverflow
import androidx.compose.ui.unit.dp
import java.util.Locale
import org.gemmaedge.app.model.AnswerNumbers
import org.gemmaedge.app.model.ChatState
import org.gemmaedge.app.model.Entry
import org.gemmaedge.app.model.Load
import org.gemmaedge.app.model.SavedConversation
import org.gemmaedge.app.model.SavedPicture
import org.gemmaedge.app.model.readable

/** What the screen of a chat lets the user do. */
interface ChatActions {
    fun send(text: String)

    fun stop()

    fun regenerate()

    /** The text of the last message, to be changed. */
    fun beginEdit(): String?

    fun cancelEdit()

    fun attachPicture()

    fun detach(index: Int)

    fun setPanAndScan(on: Boolean)

    fun open(id: String)

    fun delete(id: String)

    fun dismiss()

    /** A small copy of a picture; null while there is none to show. */
    suspend fun thumbnail(picture: SavedPicture): ImageBitmap?
}

/** [draft] is the text that is being written. */
@Composable
fun ChatScreen(state: ChatState, load: Load, draft: String, onDraft: (String) -> Unit, actions: ChatActions) {
    val ready = load as? Load.Ready
    Column(Modifier.fillMaxSize()) {
        val entries = state.conversation.entries
        if (entries.isEmpty() && state.answer == null) {
            val title = if (ready == null) "No model is in memory" else "Say something to ${ready.name}"
            val text = if (ready == null) "Load one on the Models screen." else "Nothing that you write leaves this phone."
            Nothing(title, text, Modifier.weight(1f))
        } else {
            Turns(state, ready, onDraft, actions, Modifier.weight(1f))
        }
        Column(Modifier.padding(horizontal = 12.dp), verticalArrangement = Arrangement.spacedBy(8.dp)) {
            state.error?.let { Message(it, isError = true, onDismiss = actions::dismiss) }
            if (entries.isNotEmpty() && ready == null) {
                Message(if (load is Load.Loading) "The model is being loaded." else NO_MODEL, isError = false, onDismiss = null)
            }
            Composer(state, ready, draft, onDraft, actions)
        }
    }
}

@Composable
private fun Turns(
    state: ChatState, ready: Load.Ready?, onDraft: (String) -> Unit, actions: ChatActions, modifier: Modifier,
) {
    val entries = state.conversation.entries
    val list = rememberLazyListState()
    val count = entries.size + if (state.answer == null) 0 else 1
    val length = state.answer?.length ?: 0
    // The list follows the answer until someone scrolls away from its end.
    var follows by remember { mutableStateOf(true) }
    LaunchedEffect(list) {
        snapshotFlow { list.isScrollInProgress }.collect { scrolls -> if (!scrolls) follows = !list.canScrollForward }
    }
    LaunchedEffect(count) { if (count > 0) list.scrollToItem(count - 1, Int.MAX_VALUE / 2) }
    LaunchedEffect(length / 40) { if (count > 0 && follows) list.scrollToItem(count - 1, Int.MAX_VALUE / 2) }
    LazyColumn(
        modifier.fillMaxWidth(),
        state = list,
        contentPadding = PaddingValues(12.dp),
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        itemsIndexed(entries) { index, entry ->
            val isLastOfItsKind = state.answer == null && index >= entries.indexOfLast { it.user }
            Bubble(entry, actions) {
                if (isLastOfItsKind && ready != null && entry.user) {
                    Tool(Icons.Edit, "Change this message") { actions.beginEdit()?.let(onDraft) }
                    if (index == entries.lastIndex) Tool(Icons.Refresh, "Ask for the answer again", onClick = actions::regenerate)
                }
                if (isLastOfItsKind && ready != null && !entry.user) {
                    Tool(Icons.Refresh, "Ask for the answer again", onClick = actions::regenerate)
                }
            }
        }
        val answer = state.answer
        if (answer != null) {
            item {
                val share = state.prefill
                if (answer.isEmpty()) Progress("Reading the prompt", share, onStop = null)
                else Bubble(Entry(user = false, answer), actions) {}
            }
        }
    }
}

@Composable
private fun Bubble(entry: Entry, actions: ChatActions, tools: @Composable () -> Unit) = Column(
    Modifier.fillMaxWidth(), horizontalAlignment = if (entry.user) Alignment.End else Alignment.Start,
) {
    val colors = MaterialTheme.colorScheme
    Surface(
        Modifier.widthIn(max = 340.dp),
        shape = RoundedCornerShape(16.dp),
        color = if (entry.user) colors.primaryContainer else colors.surfaceContainer,
    ) {
        Column(Modifier.padding(12.dp), verticalArrangement = Arrangement.spacedBy(8.dp)) {
            if (entry.pictures.isNotEmpty()) {
                FlowRow(horizontalArrangement = Arrangement.spacedBy(8.dp), verticalArrangement = Arrangement.spacedBy(8.dp)) {
                    for (picture in entry.pictures) Thumbnail(picture, 120, actions)
                }
            }
            if (entry.text.isNotEmpty()) SelectionContainer { Text(entry.text) }
            entry.note?.let { Secondary(it) }
        }
    }
    Row(verticalAlignment = Alignment.CenterVertically) {
        entry.numbers?.let { Column(Modifier.weight(1f, fill = false).padding(start = 12.dp, top = 4.dp)) { Numbers(it) } }
        tools()
    }
}

@Composable
private fun Numbers(numbers: AnswerNumbers) {
    Secondary(
        "first token %.2f s · prefill %.0f tok/s (%d) · decode %.1f tok/s (%d)".format(
            Locale.ROOT,
            numbers.firstTokenSeconds, numbers.prefillTokensPerSecond, numbers.promptTokens,
            numbers.decodeTokensPerSecond, numbers.newTokens,
        ),
    )
    Secondary("app memory ${readable(numbers.processBytes)} · context ${numbers.contextUsed} of ${numbers.context}")
}

@Composable
private fun Thumbnail(picture: SavedPicture, side: Int, actions: ChatActions) {
    val image by produceState<ImageBitmap?>(null, picture.file) { value = actions.thumbnail(picture) }
    val name = if (picture.panAndScan) "Picture, with Pan & Scan" else "Picture"
    Box(
        Modifier.size(side.dp).clip(RoundedCornerShape(8.dp)).background(MaterialTheme.colorScheme.surfaceVariant)
            .semantics { contentDescription = name },
    ) {
        image?.let { Image(it, contentDescription = null, Modifier.fillMaxSize(), contentScale = ContentScale.Crop) }
    }
}

@Composable
private fun Composer(
    state: ChatState, ready: Load.Ready?, draft: String, onDraft: (String) -> Unit, actions: ChatActions,
) = Column(Modifier.padding(bottom = 8.dp)) {
    val takesPictures = ready?.bundle?.manifest?.model?.vision != null
    if (state.editing) {
        Row(verticalAlignment = Alignment.CenterVertically) {
            Text("Changing the last message", Modifier.weight(1f), style = MaterialTheme.typography.labelLarge)
            TextButton({
                actions.cancelEdit()
                onDraft("")
            }) { Text("Keep it") }
        }
    }
    if (state.pictures.isNotEmpty()) {
        FlowRow(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
            state.pictures.forEachIndexed { index, picture ->
                Row(verticalAlignment = Alignment.CenterVertically) {
                    Thumbnail(picture, 56, actions)
                    Tool(Icons.Close, "Remove picture ${index + 1}") { actions.detach(index) }
                }
            }
        }
    }
    if (takesPictures) {
        Row(
            Modifier.fillMaxWidth().toggleable(state.panAndScan, role = Role.Switch, onValueChange = actions::setPanAndScan),
            verticalAlignment = Alignment.CenterVertically,
        ) {
            Text("Pan & Scan: also look at parts of the next picture", Modifier.weight(1f), style = MaterialTheme.typography.bodySmall)
            Switch(state.panAndScan, onCheckedChange = null, Modifier.padding(8.dp))
        }
    }
    Row(verticalAlignment = Alignment.Bottom, horizontalArrangement = Arrangement.spacedBy(4.dp)) {
        if (takesPictures) Tool(Icons.Picture, "Add a picture", enabled = state.answer == null, onClick = actions::attachPicture)
        OutlinedTextField(
            draft, onDraft, Modifier.weight(1f),
            placeholder = { Text("Message") },
            maxLines = 5,
            shape = RoundedCornerShape(24.dp),
        )
        val running = state.answer != null
        FilledIconButton(
            {
                if (running) {
                    actions.stop()
                } else {
                    actions.send(draft)
                    onDraft("")
                }
            },
            Modifier.padding(bottom = 4.dp).size(48.dp),
            enabled = running || (ready != null && (draft.isNotBlank() || state.pictures.isNotEmpty())),
        ) {
            Icon(if (running) Icons.Stop else Icons.Send, contentDescription = if (running) "Stop the answer" else "Send")
        }
    }
}

/** The saved conversations. */
@Composable
fun ConversationsScreen(saved: List<SavedConversation>, actions: ChatActions, onOpened: () -> Unit) {
    if (saved.isEmpty()) return Nothing("No saved conversations", "Every conversation is saved here as soon as it begins.")
    LazyColumn(contentPadding = PaddingValues(16.dp), verticalArrangement = Arrangement.spacedBy(8.dp)) {
        itemsIndexed(saved, key = { _, one -> one.id }) { _, one ->
            Card({
                actions.open(one.id)
                onOpened()
            }, Modifier.fillMaxWidth()) {
                Row(Modifier.padding(start = 16.dp), verticalAlignment = Alignment.CenterVertically) {
                    Column(Modifier.weight(1f).padding(vertical = 12.dp)) {
                        Text(one.title, maxLines = 1, overflow = TextOverflow.Ellipsis)
                        val count = one.entries.size
                        Secondary(if (count == 1) "1 message" else "$count messages")
                    }
                    Tool(Icons.Delete, "Delete the conversation ${one.title}") { actions.delete(one.id) }
                }
            }
        }
    }
}

private const val NO_MODEL = "No model is in memory. Load one on the Models screen to go on."
