package org.gemmaedge.app.model

import java.io.IOException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Chat
import org.gemmaedge.core.Conversation
import org.gemmaedge.core.Engine
import org.gemmaedge.core.Event
import org.gemmaedge.core.Images
import org.gemmaedge.core.Picture
import org.gemmaedge.core.Role
import org.gemmaedge.core.StopReason
import org.gemmaedge.core.Turn
import org.gemmaedge.core.UserError

/**
 * The screen of a chat. [answer] is the answer that is being written (null: none), [prefill] the share of the prompt that
 * is fed, [pictures] those of the next message, [error] a sentence about what went wrong.
 */
data class ChatState(
    val conversation: SavedConversation,
    val answer: String? = null,
    val prefill: Float? = null,
    val pictures: List<SavedPicture> = emptyList(),
    val panAndScan: Boolean = false,
    val editing: Boolean = false,
    val error: String? = null,
    val saved: List<SavedConversation> = emptyList(),
)

/** One conversation at a time with the model in memory. Each is saved when it changes. */
class ChatModel(
    private val platform: Platform,
    private val host: EngineHost,
    private val scope: CoroutineScope,
    private val io: CoroutineDispatcher = Dispatchers.IO,
    private val newId: () -> String = { System.currentTimeMillis().toString() },
) {
    private val store = Conversations(platform.conversations)
    private val mutable = MutableStateFlow(ChatState(store.lastOpen() ?: SavedConversation(newId())))

    // Both belong to the engine's thread.
    private var conversation: Conversation? = null
    private var fed: String? = null

    @Volatile private var answering: Job? = null

    val state: StateFlow<ChatState> = mutable.asStateFlow()

    fun refresh(): Job = scope.launch(io) { list() }

    fun startNew() = show(SavedConversation(newId()))

    fun open(id: String): Job = scope.launch(io) {
        val found = store.read(id)
        if (found == null) fail("The conversation cannot be read; it is damaged or gone.") else show(found)
    }

    fun delete(id: String): Job = scope.launch(io) {
        if (mutable.value.conversation.id == id) startNew()
        answering?.join() // or its end would save the conversation again
        store.delete(id)
        list()
    }

    fun setPanAndScan(on: Boolean) = mutable.update { it.copy(panAndScan = on) }

    /** Adds a picture to the next message. [read] gives its file's bytes. */
    fun attach(read: () -> ByteArray): Job = scope.launch(io) {
        try {
            val bytes = read()
            val vision = (host.load.value as? Load.Ready)?.bundle?.manifest?.model?.vision
                ?: throw BadInput("the model in memory takes no pictures; load one that does")
            // Only to tell now, not at the answer, that it is no picture.
            Images.prepare(bytes, platform.decoder, vision.imageSize, panAndScan = false)
            val name = store.savePicture(mutable.value.conversation.id, bytes)
            mutable.update { it.copy(pictures = it.pictures + SavedPicture(name, it.panAndScan), error = null) }
        } catch (error: Throwable) {
            fail(sentence(error))
        }
    }

    fun detach(index: Int) = mutable.update { it.copy(pictures = it.pictures.filterIndexed { at, _ -> at != index }) }

    /** A small copy of a picture of the conversation on the screen; null if its file is gone. */
    suspend fun <T> thumbnail(picture: SavedPicture, decode: (ByteArray) -> T?): T? = withContext(io) {
        try {
            decode(store.picture(mutable.value.conversation.id, picture.file))
        } catch (_: Exception) { // also what the platform's decoder throws
            null
        } catch (_: OutOfMemoryError) {
            null
        }
    }

    /**
     * Sends [text] and the attached pictures; while editing, in place of the last message.
     *
     * A last message that was never answered gives way: the model has not seen it, and turns alternate.
     */
    fun send(text: String) {
        val before = mutable.value
        if (before.answer != null || (text.isBlank() && before.pictures.isEmpty())) return
        val entry = Entry(user = true, text = text, pictures = before.pictures)
        val kept = if (before.editing) withoutLast(before.conversation.entries) else before.conversation.entries
        answer(kept.dropLastWhile { it.user } + entry, again = false)
    }

    /** Asks for the last answer again. */
    fun regenerate() {
        val before = mutable.value
        val entries = before.conversation.entries.dropLastWhile { !it.user }
        if (before.answer != null || entries.isEmpty()) return
        answer(entries, again = true)
    }

    /** Lets the user change the last message: its pictures are attached again. Returns its text. */
    fun beginEdit(): String? {
        val last = mutable.value.conversation.entries.lastOrNull { it.user } ?: return null
        mutable.update { it.copy(editing = true, pictures = last.pictures) }
        return last.text
    }

    fun cancelEdit() = mutable.update { it.copy(editing = false, pictures = emptyList()) }

    fun stop() = host.stop()

    fun dismiss() = mutable.update { it.copy(error = null) }

    /** [entries] end with the message that is answered. */
    private fun answer(entries: List<Entry>, again: Boolean) {
        val before = mutable.value
        val saved = before.conversation.copy(entries = entries)
        mutable.update {
            it.copy(conversation = saved, answer = "", prefill = 0f, pictures = emptyList(), editing = false, error = null)
        }
        answering = host.run(this) { ready, engine, fresh, cancelled ->
            try {
                save(saved)
                val talk = conversation(ready, engine, fresh, before.conversation)
                val asked = entries.last()
                val pictures = pictures(ready, saved.id, asked)
                val isAsked = talk.turns.size > entries.size // the turn is there with an answer, perhaps an empty one
                follow(
                    when {
                        isAsked && again -> talk.regenerate(cancelled)
                        isAsked -> talk.edit(asked.text, pictures, cancelled)
                        else -> talk.say(asked.text, pictures, cancelled)
                    },
                    saved,
                )
            } catch (error: Throwable) {
                if (error !is UserError) conversation = null // it may not be what the engine holds
                finish(saved, sentence(error))
            }
        }
        answering?.invokeOnCompletion {
            // It was stopped before it began, or no model was there.
            if (mutable.value.conversation === saved) finish(saved, if (host.load.value is Load.Ready) null else NO_MODEL)
        }
    }

    private fun follow(events: Sequence<Event>, saved: SavedConversation) {
        val text = StringBuilder()
        for (event in events) {
            when (event) {
                is Event.Prefill -> update(saved) { it.copy(prefill = event.done.toFloat() / event.total) }
                is Event.Text -> {
                    text.append(event.piece)
                    update(saved) { it.copy(answer = text.toString(), prefill = null) }
                }
                is Event.Done -> {
                    val numbers = AnswerNumbers(event.numbers, processMemory())
                    val entry = Entry(user = false, text.toString(), numbers = numbers, note = NOTES[event.reason])
                    val whole = saved.copy(entries = saved.entries + entry)
                    val problem = try {
                        save(whole)
                        null
                    } catch (error: IOException) {
                        sentence(error)
                    }
                    finish(whole, problem)
                }
            }
        }
    }

    /** The conversation whose turns are in the engine's caches, or one that feeds those of [shown] at its next turn. */
    private fun conversation(
        ready: Load.Ready, engine: Engine, fresh: Boolean, shown: SavedConversation,
    ): Conversation {
        conversation?.takeIf { !fresh && fed == shown.id }?.let { return it }
        val manifest = ready.bundle.manifest
        Chat.checkFormat(manifest)
        engine.reset()
        val talk = Conversation(ready.bundle, engine, manifest.sampling, SEED)
        val turns = shown.entries.map { entry ->
            Turn(if (entry.user) Role.USER else Role.ASSISTANT, entry.text, pictures(ready, shown.id, entry))
        }
        // A message that was never answered is asked again, not restored.
        talk.restore(if (turns.lastOrNull()?.role == Role.USER) turns.dropLast(1) else turns)
        conversation = talk
        fed = shown.id
        return talk
    }

    private fun pictures(ready: Load.Ready, id: String, entry: Entry): List<Picture> {
        if (entry.pictures.isEmpty()) return emptyList()
        val vision = ready.bundle.manifest.model.vision
            ?: throw BadInput("this conversation has pictures, and the model in memory takes none; load one that does")
        return entry.pictures.map {
            Images.prepare(store.picture(id, it.file), platform.decoder, vision.imageSize, it.panAndScan)
        }
    }

    /** The files are read before the update, which begins again whenever an answer goes on meanwhile. */
    private fun list() {
        val saved = store.all()
        mutable.update { it.copy(saved = saved) }
    }

    private fun save(saved: SavedConversation) {
        store.save(saved)
        if (mutable.value.conversation.id == saved.id) store.open(saved.id)
    }

    private fun finish(saved: SavedConversation, error: String?) = update(saved) {
        it.copy(conversation = saved, answer = null, prefill = null, error = error)
    }

    /** Changes the screen, if it still shows the conversation that is answered. */
    private fun update(saved: SavedConversation, change: (ChatState) -> ChatState) =
        mutable.update { if (it.conversation.id == saved.id && it.answer != null) change(it) else it }

    private fun show(saved: SavedConversation) {
        host.stop()
        store.open(saved.id)
        mutable.update { ChatState(saved, panAndScan = it.panAndScan, saved = it.saved) }
    }

    private fun fail(sentence: String) = mutable.update { it.copy(error = sentence) }

    private fun withoutLast(entries: List<Entry>) = entries.dropLastWhile { !it.user }.dropLast(1)

    private companion object {
        const val SEED = 0L
        const val NO_MODEL = "No model is in memory; load one, then send again."
        val NOTES = mapOf(
            StopReason.CANCELLED to "Stopped.",
            StopReason.CONTEXT to "The context is full: start a new conversation, or export with a larger context.",
            StopReason.LENGTH to "Cut at the longest answer.",
        )
    }
}
