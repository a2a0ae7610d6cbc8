package org.gemmaedge.core

/** A part of a message: text, or an image that is followed by [Image.crops] Pan & Scan crops of it. */
sealed interface Part {
    class Text(val text: String) : Part

    class Image(val crops: Int = 0) : Part
}

enum class Role { SYSTEM, USER, ASSISTANT }

class Message(val role: Role, val parts: List<Part>) {
    constructor(role: Role, text: String) : this(role, listOf(Part.Text(text)))
}

/**
 * Gemma 3's prompts: turns conversations into ids.
 *
 * Each turn is `<start_of_turn>`, the role, a newline, the content, `<end_of_turn>` and a newline. A system message has
 * no turn of its own: its text is in front of the first user's content. Content is plain text, whatever it spells.
 */
object Chat {
    const val IMAGE_MARKER = "<image>"

    // What Python's strip() removes.
    private const val WHITESPACE =
        "\t\n\u000b\u000c\r\u001c\u001d\u001e\u001f \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006" +
            "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

    /** As the other [encode]; throws [BadInput] too when the bundle's conversations do not have Gemma's form. */
    fun encode(bundle: Bundle, messages: List<Message>, addGenerationPrompt: Boolean = true): IntArray {
        checkFormat(bundle.manifest)
        return encode(bundle.tokenizer, bundle.manifest.model.vision?.tokensPerImage, messages, addGenerationPrompt)
    }

    /**
     * The ids of a conversation. Each image and each of its crops has [tokensPerImage] soft tokens (null: a text-only
     * model).
     *
     * Throws [BadInput] when the roles do not alternate user / assistant after an optional system message, when there
     * is no user message, when the system message is not one text, and for an image in a text-only model's prompt.
     */
    fun encode(
        tokenizer: Tokenizer, tokensPerImage: Int?, messages: List<Message>, addGenerationPrompt: Boolean = true,
    ): IntArray {
        val system = messages.firstOrNull()?.takeIf { it.role == Role.SYSTEM }
        val turns = if (system == null) messages else messages.drop(1)
        if (turns.isEmpty()) throw BadInput("the conversation has no user message; give at least one")
        val ids = Ids()
        ids += tokenizer.bosId
        turns.forEachIndexed { index, message ->
            val expected = if (index % 2 == 0) Role.USER else Role.ASSISTANT
            if (message.role != expected) {
                throw BadInput(
                    "message ${index + 1} after the system text has the role ${message.role}, expected $expected: " +
                        "turns alternate user / assistant, beginning with user",
                )
            }
            val prefix = if (index == 0 && system != null) systemText(system) else null
            ids += turn(tokenizer, tokensPerImage, message, prefix)
        }
        if (addGenerationPrompt) ids += answerStart(tokenizer)
        return ids.toIntArray()
    }

    /** Throws [BadInput] when conversations of this bundle have a form that takes Jinja to make. */
    fun checkFormat(manifest: Manifest) {
        val format = manifest.tokenizer.chatFormat
        if (format != "gemma") {
            throw BadInput(
                "this model's chats have a form of their own (chat_format is $format), which this app cannot make; " +
                    "export a model with Gemma's own chat template",
            )
        }
    }

    /**
     * The parts of a prompt: [text] with images in place of its markers `<image>`, in order, or before it if it has no
     * marker. [crops] has the number of crops of each image.
     *
     * For a text-only model `<image>` is ordinary text. Throws [BadInput] when there are markers, but not as many as
     * images.
     */
    fun place(text: String, crops: List<Int>, vision: Vision?): List<Part> {
        if (vision == null && crops.isEmpty()) return listOf(Part.Text(text))
        val texts = text.split(IMAGE_MARKER)
        val markers = texts.size - 1
        if (markers == 0) return crops.map { Part.Image(it) } + Part.Text(text)
        if (markers != crops.size) {
            throw BadInput(
                "the text has ${counted(markers, "marker")} $IMAGE_MARKER for ${counted(crops.size, "image")}; " +
                    "write one for each image, or none to put the images first",
            )
        }
        return texts.flatMapIndexed { index, piece ->
            listOfNotNull(if (index == 0) null else Part.Image(crops[index - 1]), Part.Text(piece))
        }
    }

    /** One turn with its markers. [system] is a text in front of the content. */
    internal fun turn(tokenizer: Tokenizer, tokensPerImage: Int?, message: Message, system: String?): IntArray {
        val role = if (message.role == Role.ASSISTANT) "model" else "user"
        val head = "$role\n" + if (system == null) "" else "$system\n\n"
        val trimmed = message.parts.map { if (it is Part.Text) Part.Text(strip(it.text)) else it }
        return intArrayOf(tokenizer.specialId(Tokenizer.START_OF_TURN)) +
            encodeParts(tokenizer, tokensPerImage, listOf(Part.Text(head)) + trimmed) + turnEnd(tokenizer)
    }

    internal fun turnEnd(tokenizer: Tokenizer): IntArray =
        intArrayOf(tokenizer.specialId(Tokenizer.END_OF_TURN)) + tokenizer.encode("\n", bos = false)

    /** What asks for an answer. */
    internal fun answerStart(tokenizer: Tokenizer): IntArray =
        intArrayOf(tokenizer.specialId(Tokenizer.START_OF_TURN)) + tokenizer.encode("model\n", bos = false)

    internal fun strip(text: String): String = text.trim { it in WHITESPACE }

    private fun systemText(message: Message): String = (message.parts.singleOrNull() as? Part.Text)?.text
        ?: throw BadInput(
            "the system message has ${counted(message.parts.size, "part")}, expected one text; " +
                "images go into a user's message",
        )

    /** The ids of texts and images. The text between two images, with the newlines around them, is encoded as one. */
    private fun encodeParts(tokenizer: Tokenizer, tokensPerImage: Int?, parts: List<Part>): IntArray {
        val images = parts.count { it is Part.Image }
        if (images > 0 && tokensPerImage == null) {
            throw BadInput(
                "${counted(images, "image")} for a text-only model; leave images out, or use a multimodal one",
            )
        }
        val ids = Ids()
        val text = StringBuilder()
        fun image() {
            text.append("\n\n")
            ids += tokenizer.encode(text.toString(), bos = false)
            ids += tokenizer.specialId(Tokenizer.START_OF_IMAGE)
            ids += IntArray(tokensPerImage!!) { tokenizer.specialId(Tokenizer.IMAGE_SOFT_TOKEN) }
            ids += tokenizer.specialId(Tokenizer.END_OF_IMAGE)
            text.clear()
            text.append("\n\n")
        }
        for (part in parts) {
            when (part) {
                is Part.Text -> text.append(part.text)
                is Part.Image -> {
                    if (part.crops > 0) text.append("Here is the original image ")
                    image()
                    if (part.crops > 0) text.append(" and here are some crops to help you see better")
                    repeat(part.crops) {
                        text.append(" ")
                        image()
                    }
                }
            }
        }
        ids += tokenizer.encode(text.toString(), bos = false)
        return ids.toIntArray()
    }
}

/** The number with its noun: "1 image", "2 images". */
internal fun counted(number: Int, noun: String): String = if (number == 1) "1 $noun" else "$number ${noun}s"
