package org.gemmaedge.core

/** One turn of a conversation, as a reader sees it. */
class Turn(val role: Role, val text: String, val pictures: List<Picture> = emptyList())

/** How long an answer took. [promptTokens] were fed for it; what the caches held already is not among them. */
class Numbers(
    val promptTokens: Int,
    val newTokens: Int,
    val firstTokenSeconds: Double,
    val prefillTokensPerSecond: Double,
    val decodeTokensPerSecond: Double,
    val contextUsed: Int,
    val context: Int,
)

/** What happens while a conversation answers. */
sealed interface Event {
    /** [done] of [total] tokens of the prompt are fed. */
    class Prefill(val done: Int, val total: Int) : Event

    /** The next words of the answer; never a part of a character. */
    class Text(val piece: String) : Event

    class Done(val reason: StopReason, val numbers: Numbers) : Event
}

/**
 * A chat over one engine, which nothing else may feed meanwhile. Earlier turns stay in the engine's caches. It belongs
 * to one thread at a time.
 *
 * Before each answer the ids of the whole conversation are compared with those that the engine holds. It goes back to
 * where they part, or is fed from the start if its caches cannot go back so far. The model's own ids are kept: encoding
 * its words again could split them into other tokens.
 *
 * Answers are lazy: the caller's iteration does the work, and may end at any time; what was said until then stays in
 * the conversation. Throws [BadInput] when the bundle's chats have a form of their own, and for settings out of range.
 */
class Conversation(
    bundle: Bundle,
    engine: Engine,
    settings: Sampling,
    seed: Long = 0,
    private val system: String? = null,
    private val maxNewTokens: Int? = null,
    private val nanoTime: () -> Long = System::nanoTime,
) {
    private val manifest = bundle.manifest.also { Chat.checkFormat(it) }
    private val vision = manifest.model.vision
    private val tokenizer = bundle.tokenizer
    private val sampler = Sampler(settings, seed)
    private val fed = Fed(engine, manifest)
    private val answerStart = Chat.answerStart(tokenizer)
    private val turnEnd = Chat.turnEnd(tokenizer)
    private var exchanges = listOf<Exchange>()

    /** A user's turn, its ids with their markers, and the model's answer to it: its ids and its words so far. */
    private class Exchange(val user: Turn, val asked: IntArray) {
        val said = Ids()
        val answer = StringBuilder()
    }

    init {
        if (maxNewTokens != null && maxNewTokens < 1) {
            throw BadInput("the number of new tokens is $maxNewTokens; use 1 or more")
        }
    }

    /** The turns so far: a user's, then the model's, and so on. */
    val turns: List<Turn> get() = exchanges.flatMap { listOf(it.user, Turn(Role.ASSISTANT, it.answer.toString())) }

    /**
     * Answers [text]. [Chat.place] decides where [pictures] go.
     *
     * The iteration throws [BadInput] for text or pictures that cannot be used, and [DoesNotFit] when the conversation
     * is over the context. After such an error the conversation is as it was.
     */
    fun say(
        text: String, pictures: List<Picture> = emptyList(), cancelled: () -> Boolean = { false },
    ): Sequence<Event> = answer(cancelled) {
        exchanges + exchange(Turn(Role.USER, text, pictures), isFirst = exchanges.isEmpty())
    }

    /** Answers the last turn of the user again. The iteration throws as that of [say], and when there is none. */
    fun regenerate(cancelled: () -> Boolean = { false }): Sequence<Event> = answer(cancelled) {
        exchanges.dropLast(1) + Exchange(last().user, last().asked)
    }

    /** Replaces the last turn of the user, and answers it. The iteration throws as that of [regenerate]. */
    fun edit(
        text: String, pictures: List<Picture> = emptyList(), cancelled: () -> Boolean = { false },
    ): Sequence<Event> = answer(cancelled) {
        last()
        exchanges.dropLast(1) + exchange(Turn(Role.USER, text, pictures), isFirst = exchanges.size == 1)
    }

    /**
     * Puts saved [turns] in place of this conversation. They are fed with the next answer.
     *
     * A last turn of the user without an answer gets an empty one. Throws [BadInput] when the turns do not alternate
     * user / assistant, and for pictures that cannot be used; then the conversation is as it was.
     */
    fun restore(turns: List<Turn>) {
        turns.forEachIndexed { index, turn ->
            val expected = if (index % 2 == 0) Role.USER else Role.ASSISTANT
            if (turn.role != expected) {
                throw BadInput(
                    "turn ${index + 1} of the saved chat is the ${turn.role}'s, expected the $expected's; delete it",
                )
            }
        }
        exchanges = turns.chunked(2).mapIndexed { index, pair ->
            exchange(pair[0], isFirst = index == 0).also {
                val answer = pair.getOrNull(1)?.text ?: ""
                it.answer.append(answer)
                it.said += tokenizer.encode(Chat.strip(answer), bos = false)
            }
        }
    }

    /** Forgets all turns. */
    fun reset() {
        exchanges = emptyList()
        fed.reset()
    }

    private fun last(): Exchange = exchanges.lastOrNull()
        ?: throw BadInput("the chat has no turn yet; write something first")

    private fun exchange(user: Turn, isFirst: Boolean): Exchange {
        val parts = Chat.place(user.text, user.pictures.map { it.pixels.size - 1 }, vision)
        val prefix = system.takeIf { isFirst }
        return Exchange(user, Chat.turn(tokenizer, vision?.tokensPerImage, Message(Role.USER, parts), prefix))
    }

    /** The ids of a conversation up to its last answer, as Gemma's form has them. */
    private fun encode(exchanges: List<Exchange>): IntArray {
        val ids = Ids()
        ids += tokenizer.bosId
        exchanges.forEachIndexed { index, exchange ->
            ids += exchange.asked
            ids += answerStart
            if (index < exchanges.lastIndex) {
                ids += exchange.said.toIntArray()
                ids += turnEnd
            }
        }
        return ids.toIntArray()
    }

    private fun answer(cancelled: () -> Boolean, next: () -> List<Exchange>): Sequence<Event> = sequence {
        val start = nanoTime()
        fun seconds() = (nanoTime() - start) / 1e9
        val before = exchanges
        val after = next()
        val pixels = after.flatMap { exchange -> exchange.user.pictures.flatMap { it.pixels } }
        val feeds = fed.align(encode(after), pixels)
        val generation = Generation(manifest, fed, sampler, maxNewTokens)
        val exchange = after.last()
        exchanges = after
        val total = feeds.sumOf { it.ids.size }
        var done = 0
        yield(Event.Prefill(done, total))
        for (feed in feeds) {
            val goesOn = try {
                generation.feed(feed, cancelled)
            } catch (error: Throwable) {
                exchanges = before
                throw error
            }
            if (!goesOn) break
            done += feed.ids.size
            yield(Event.Prefill(done, total))
        }
        val prefillSeconds = seconds()
        val decoder = tokenizer.decoder()
        var count = 0
        var firstSeconds = 0.0
        var lastSeconds = 0.0
        while (true) {
            val token = generation.next(cancelled) ?: break
            lastSeconds = seconds()
            if (count++ == 0) firstSeconds = lastSeconds
            exchange.said += token
            val piece = decoder.push(token)
            exchange.answer.append(piece)
            if (piece.isNotEmpty()) yield(Event.Text(piece))
        }
        val rest = decoder.flush()
        exchange.answer.append(rest)
        if (rest.isNotEmpty()) yield(Event.Text(rest))
        val numbers = Numbers(
            promptTokens = done,
            newTokens = count,
            firstTokenSeconds = firstSeconds,
            prefillTokensPerSecond = rate(done, prefillSeconds),
            decodeTokensPerSecond = rate(count - 1, lastSeconds - firstSeconds),
            contextUsed = fed.size,
            context = manifest.context,
        )
        yield(Event.Done(checkNotNull(generation.reason), numbers))
    }.constrainOnce()

    private fun rate(tokens: Int, seconds: Double): Double = if (tokens > 0 && seconds > 0) tokens / seconds else 0.0
}
