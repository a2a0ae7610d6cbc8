package org.gemmaedge.app.model

import java.io.File
import java.io.IOException
import java.security.MessageDigest
import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import org.gemmaedge.core.Numbers

/** A picture of a conversation: its file's name in the conversation's folder, and whether Pan & Scan cuts crops of it. */
@Serializable
data class SavedPicture(val file: String, val panAndScan: Boolean)

/** What one answer took. */
@Serializable
data class AnswerNumbers(
    val promptTokens: Int,
    val newTokens: Int,
    val firstTokenSeconds: Double,
    val prefillTokensPerSecond: Double,
    val decodeTokensPerSecond: Double,
    val contextUsed: Int,
    val context: Int,
    val processBytes: Long,
) {
    constructor(numbers: Numbers, processBytes: Long) : this(
        numbers.promptTokens,
        numbers.newTokens,
        numbers.firstTokenSeconds,
        numbers.prefillTokensPerSecond,
        numbers.decodeTokensPerSecond,
        numbers.contextUsed,
        numbers.context,
        processBytes,
    )
}

/** A turn as the screen shows it and as it is saved. [note] says why an answer ended early. */
@Serializable
data class Entry(
    val user: Boolean,
    val text: String,
    val pictures: List<SavedPicture> = emptyList(),
    val numbers: AnswerNumbers? = null,
    val note: String? = null,
)

@Serializable
data class SavedConversation(val id: String, val entries: List<Entry> = emptyList()) {
    /** The beginning of the first text. */
    val title: String
        get() = entries.firstOrNull()?.text?.trim()?.lineSequence()?.first()?.ifEmpty { null } ?: "A picture"
}

/** Conversations below [folder]: a folder each, with `conversation.json` and the pictures. */
class Conversations(private val folder: File) {
    private val json = Json { ignoreUnknownKeys = true }
    private val current = File(folder, "current")

    /** All of them, the last changed first. One that is damaged is left out. */
    fun all(): List<SavedConversation> = folder.listFiles().orEmpty()
        .filter { file(it.name).isFile }
        .sortedByDescending { file(it.name).lastModified() }
        .mapNotNull { read(it.name) }

    fun read(id: String): SavedConversation? = try {
        json.decodeFromString<SavedConversation>(file(id).readText())
    } catch (_: IOException) {
        null
    } catch (_: SerializationException) {
        null
    }

    /** The conversation that was open last, if the app was ended. */
    fun lastOpen(): SavedConversation? = try {
        if (current.isFile) read(current.readText()) else null
    } catch (_: IOException) {
        null
    }

    /** Remembers which one is open; without room for that, the next start opens a new one. */
    fun open(id: String) {
        try {
            folder.mkdirs()
            current.writeText(id)
        } catch (_: IOException) {
            current.delete()
        }
    }

    /** Saves as a whole or not at all. */
    fun save(conversation: SavedConversation) {
        val target = file(conversation.id)
        target.parentFile!!.mkdirs()
        val part = File(target.path + ".part")
        part.writeText(json.encodeToString(SavedConversation.serializer(), conversation))
        if (!part.renameTo(target)) throw IOException("$target cannot be written")
    }

    /** Keeps a picture's [bytes]; the same bytes have the same name. */
    fun savePicture(id: String, bytes: ByteArray): String {
        val hash = MessageDigest.getInstance("SHA-256").digest(bytes)
        val name = hash.take(8).joinToString("") { "%02x".format(it) } + ".picture"
        val target = File(File(folder, id), name)
        target.parentFile!!.mkdirs()
        if (!target.exists()) target.writeBytes(bytes)
        return name
    }

    fun picture(id: String, name: String): ByteArray = File(File(folder, id), name).readBytes()

    fun delete(id: String) {
        File(folder, id).deleteRecursively()
    }

    private fun file(id: String) = File(File(folder, id), "conversation.json")
}
