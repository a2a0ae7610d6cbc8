package org.gemmaedge.core

import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.double
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive

class ConversationTest {
    private val reasons = mapOf(
        "stop token" to StopReason.STOP_TOKEN, "length" to StopReason.LENGTH, "context" to StopReason.CONTEXT,
    )

    private fun picture(vararg shades: Int) = Picture(shades.map { Pixels(8, ByteArray(192) { _ -> it.toByte() }) })

    private fun words(events: Sequence<Event>): String =
        events.filterIsInstance<Event.Text>().joinToString("") { it.piece }

    @Test
    fun chatsArePythons() {
        var turns = 0
        var full = 0
        for (case in TextVectors.json("conversations.json").jsonArray) {
            val bundle = demoBundle(case[0].jsonPrimitive.boolean)
            val engine = FakeEngine(bundle.manifest)
            val settings =
                Sampling(case[1].jsonPrimitive.double, case[2].jsonPrimitive.int, case[3].jsonPrimitive.double)
            val limit = if (case[5].isNull) null else case[5].jsonPrimitive.int
            val chat = Conversation(bundle, engine, settings, case[4].jsonPrimitive.int.toLong(), null, limit)
            for (turn in case[6].jsonArray) {
                val pictures = turn[1].jsonArray.map { picture(*it.ids) }
                if (turn[2].isNull) {
                    full++
                    val before = shown(chat)
                    val error = assertFailsWith<DoesNotFit> { chat.say(turn[0].text, pictures).count() }
                    assertTrue("over the context" in error.message!!, error.message)
                    assertEquals(before, shown(chat))
                } else {
                    turns++
                    val events = chat.say(turn[0].text, pictures).toList()
                    assertEquals(turn[2].text, words(events.asSequence()))
                    assertEquals(turn[2].text, chat.turns.last().text)
                    assertEquals(reasons[turn[3].text], (events.last() as Event.Done).reason)
                }
                assertContentEquals(turn[4].ids, engine.fed.toIntArray(), "${turn[0]}")
            }
            assertEquals(1, engine.resets)
        }
        println("chats: $turns turns, $full refused for lack of room")
        assertTrue(full > 20)
    }

    private fun shown(chat: Conversation) = chat.turns.map { Triple(it.role, it.text, it.pictures) }

    /** The prompt that the engine holds reads as the conversation, but for whitespace around the model's own words. */
    private fun checkPrompt(bundle: Bundle, chat: Conversation, engine: FakeEngine, system: String?) {
        val messages = listOfNotNull(system?.let { Message(Role.SYSTEM, it) }) +
            chat.turns.dropLast(1).map { message(bundle, it) }
        val fed = engine.fed.take(promptEnd(bundle, engine)).toIntArray()
        fun read(ids: IntArray) = bundle.tokenizer.decode(ids).filterNot { it.isWhitespace() }
        assertEquals(read(Chat.encode(bundle, messages)), read(fed))
    }

    private fun message(bundle: Bundle, turn: Turn): Message {
        val crops = turn.pictures.map { it.pixels.size - 1 }
        return Message(turn.role, Chat.place(turn.text, crops, bundle.manifest.model.vision))
    }

    /** Where the last answer begins. */
    private fun promptEnd(bundle: Bundle, engine: FakeEngine): Int {
        val start = Chat.answerStart(bundle.tokenizer).toList()
        return (engine.fed.size downTo start.size).first { engine.fed.subList(it - start.size, it) == start }
    }

    /**
     * Says, edits, regenerates, cancels, gives up, restores and resets at random. After each step, an engine that never
     * went back and is fed the same ids must be in the same state: whatever was rewound was rewound rightly.
     */
    @Test
    fun whateverHappensTheEngineHoldsTheConversation() {
        var rewound = 0
        var again = 0
        for (seed in 0 until 400) {
            val draw = Random(seed)
            val seeing = draw.nextBoolean()
            val bundle = demoBundle(seeing, context = draw.nextInt(60, 400), chunk = draw.nextInt(4, 30))
            val broken = booleanArrayOf(false)
            val engine = FakeEngine(bundle.manifest, rewindable = draw.nextInt(0, 120)) {
                if (broken[0]) error("the runtime failed")
            }
            val system = if (draw.nextBoolean()) "Be brief." else null
            val chat = Conversation(bundle, engine, Sampling(), 0, system, draw.nextInt(1, 20))
            repeat(draw.nextInt(1, 10)) {
                val before = shown(chat)
                val resets = engine.resets
                val position = engine.position
                val text = List(draw.nextInt(1, 8)) { WORDS.random(draw) }.joinToString(" ")
                val pictures = List(if (seeing) draw.nextInt(3) else 0) {
                    picture(*IntArray(draw.nextInt(1, 3)) { draw.nextInt(256) })
                }
                val stopAfter = if (draw.nextInt(3) == 0) draw.nextInt(12) else Int.MAX_VALUE
                var looks = 0
                val cancelled = { looks++ >= stopAfter }
                val kind = draw.nextInt(8)
                broken[0] = kind == 5
                val events = when {
                    kind < 3 || kind == 5 -> chat.say(text, pictures, cancelled)
                    kind == 3 -> chat.regenerate(cancelled)
                    kind == 4 -> chat.edit(text, pictures, cancelled)
                    kind == 6 -> emptySequence<Event>().also { chat.restore(chat.turns) }
                    else -> emptySequence<Event>().also { chat.reset() }
                }
                val heard = ArrayList<Event>()
                try {
                    val enough = if (draw.nextInt(5) == 0) draw.nextInt(1, 8) else Int.MAX_VALUE
                    for (event in events) {
                        heard += event
                        if (heard.size == enough) break
                    }
                } catch (error: UserError) {
                    assertTrue('\n' !in error.message!!, error.message)
                    assertEquals(before, shown(chat))
                    assertTrue(error is DoesNotFit || (before.isEmpty() && kind in 3..4), error.message)
                    assertEquals(position, engine.position)
                    return@repeat
                } catch (error: IllegalStateException) {
                    assertEquals("the runtime failed", error.message)
                    assertEquals(before, shown(chat))
                    broken[0] = false
                    return@repeat
                }
                if (kind == 3 || kind == 4) if (engine.resets == resets) rewound++ else again++
                val done = heard.lastOrNull() as? Event.Done
                if (done != null) {
                    assertEquals(engine.position, done.numbers.contextUsed)
                    assertEquals(words(heard.asSequence()), chat.turns.last().text)
                    val prefills = heard.filterIsInstance<Event.Prefill>()
                    assertEquals(prefills.map { it.done }.sorted(), prefills.map { it.done })
                    assertEquals(prefills.last().done, done.numbers.promptTokens)
                    val isWhole = prefills.last().done == prefills.last().total
                    assertTrue(isWhole || done.reason == StopReason.CANCELLED)
                    if (isWhole) checkPrompt(bundle, chat, engine, system)
                }
                if (heard.isNotEmpty()) checkState(bundle, chat, engine)
            }
        }
        println("edits and regenerations: $rewound by going back, $again fed again")
        assertTrue(rewound > 20 && again > 20, "$rewound $again")
    }

    /** The state of the engine is that of another one that was fed the same ids at once, with the chat's pictures. */
    private fun checkState(bundle: Bundle, chat: Conversation, engine: FakeEngine) {
        if (engine.fed.isEmpty() || chat.turns.isEmpty()) return
        val images = chat.turns.flatMap { turn -> turn.pictures.flatMap { it.pixels } }
        val fresh = FakeEngine(bundle.manifest)
        val vision = bundle.manifest.model.vision
        val runs = engine.fed.indices.count { engine.fed[it] == vision?.imageTokenId } / (vision?.tokensPerImage ?: 1)
        if (runs > images.size) return // after a reset of the conversation or a restore nothing was fed yet
        for (feed in feeds(bundle.manifest, engine.fed.toIntArray(), images.take(runs))) {
            fresh.feed(if (feed is Feed.Image) Call.Image(fresh.encode(feed.pixels)) else Call.Text(feed.ids))
        }
        assertEquals(fresh.state, engine.state, "the engine was rewound to another place than its ids say")
    }

    @Test
    fun anAnswerCutShortIsClosedBeforeTheNextTurn() {
        val bundle = demoBundle()
        val engine = FakeEngine(bundle.manifest)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 2)
        chat.say("hi").count()
        val fed = engine.fed.toList()
        chat.say("again").count()
        assertEquals(fed, engine.fed.take(fed.size))
        val next = engine.fed.drop(fed.size + 1) // after the answer's last id, which was drawn and not fed
        val turn = bundle.tokenizer.specialId("<end_of_turn>")
        assertEquals(turn, next.first())
        assertEquals(1, engine.resets)
    }

    @Test
    fun theSystemTextIsInFrontOfTheFirstTurnOnlyAlsoWhenItIsEdited() {
        val bundle = demoBundle()
        val engine = FakeEngine(bundle.manifest, rewindable = 400)
        val chat = Conversation(bundle, engine, Sampling(), system = "Be brief.", maxNewTokens = 3)
        fun prompt(text: String) =
            Chat.encode(bundle, listOf(Message(Role.SYSTEM, "Be brief."), Message(Role.USER, text))).toList()
        chat.say("one").count()
        assertEquals(prompt("one"), engine.fed.dropLast(2))
        chat.edit("two").count()
        assertEquals(prompt("two"), engine.fed.dropLast(2))
        assertEquals(1, engine.resets)
    }

    @Test
    fun aCancelledPrefillLeavesAUsableConversation() {
        val bundle = demoBundle(chunk = 4)
        val engine = FakeEngine(bundle.manifest)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 5)
        var looks = 0
        val events = chat.say("a long question about cats and dogs and foxes") { looks++ == 2 }.toList()
        assertEquals(StopReason.CANCELLED, (events.last() as Event.Done).reason)
        assertEquals(listOf(4, 4), engine.calls)
        assertEquals(listOf("a long question about cats and dogs and foxes", ""), chat.turns.map { it.text })
        chat.regenerate().count()
        assertEquals(1, engine.resets) // the first calls stay
        val prompt = Chat.encode(bundle, listOf(Message(Role.USER, chat.turns[0].text))).toList()
        assertEquals(prompt, engine.fed.take(prompt.size))
    }

    @Test
    fun aRestoredChatGoesOnAsIfItHadNeverEnded() {
        val bundle = demoBundle(seeing = true)
        val engine = FakeEngine(bundle.manifest)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 6)
        chat.say("look", listOf(picture(1, 2))).count()
        chat.say("and <image>?", listOf(picture(3))).count()
        val other = FakeEngine(bundle.manifest)
        val restored = Conversation(bundle, other, Sampling(), maxNewTokens = 6)
        restored.restore(chat.turns)
        assertEquals(0, other.position)
        assertEquals(shown(chat), shown(restored))
        restored.say("go on").count()
        assertEquals(3, other.encoded)
        val prompt = Chat.encode(bundle, restored.turns.dropLast(1).map { message(bundle, it) }).toList()
        assertEquals(prompt, other.fed.take(prompt.size))
        restored.restore(chat.turns.dropLast(1)) // the app died before the answer
        assertEquals("", restored.turns.last().text)
        restored.regenerate().count()
        assertTrue(restored.turns.last().text.isNotEmpty())
        for (wrong in listOf(chat.turns.drop(1), listOf(Turn(Role.SYSTEM, "x")), listOf(Turn(Role.USER, "\uD800")))) {
            val before = shown(restored)
            assertFailsWith<BadInput> { restored.restore(wrong) }
            assertEquals(before, shown(restored))
        }
    }

    @Test
    fun whatCannotBeSaidChangesNothing() {
        val bundle = demoBundle()
        val engine = FakeEngine(bundle.manifest)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 3)
        assertTrue("no turn yet" in assertFailsWith<BadInput> { chat.regenerate().count() }.message!!)
        assertTrue("no turn yet" in assertFailsWith<BadInput> { chat.edit("x").count() }.message!!)
        chat.say("hi").count()
        val before = shown(chat) to engine.fed.toList()
        assertFailsWith<BadInput> { chat.say("\uD800").count() }
        assertTrue("text-only" in assertFailsWith<BadInput> { chat.say("x", listOf(picture(1))).count() }.message!!)
        assertTrue("context of 400" in assertFailsWith<DoesNotFit> { chat.edit("word ".repeat(500)).count() }.message!!)
        assertEquals(before, shown(chat) to engine.fed.toList())
        val seeing = Conversation(demoBundle(seeing = true), FakeEngine(demoBundle(seeing = true).manifest), Sampling())
        val marker = assertFailsWith<BadInput> { seeing.say("<image>").count() }
        assertTrue("1 marker <image> for 0 images" in marker.message!!)
        val wrong = Picture(listOf(Pixels(7, ByteArray(147))))
        assertTrue("7 × 7" in assertFailsWith<BadInput> { seeing.say("x", listOf(wrong)).count() }.message!!)
        assertTrue(seeing.turns.isEmpty())
        assertFailsWith<BadInput> { Conversation(bundle, engine, Sampling(), maxNewTokens = 0) }
        assertFailsWith<BadInput> { Conversation(bundle, engine, Sampling(), seed = -1) }
    }

    @Test
    fun anEngineThatSomeoneElseUsedIsFedAgain() {
        val bundle = demoBundle()
        val engine = FakeEngine(bundle.manifest, rewindable = 400)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 3)
        chat.say("hi").count()
        engine.reset()
        engine.feed(Call.Text(intArrayOf(2, 3)))
        chat.say("more").count()
        assertEquals(3, engine.resets)
        assertEquals(2, engine.fed.first())
        assertEquals(5, engine.fed[1])
    }

    @Test
    fun anAnswerIsLazyAndIsGivenOnce() {
        val bundle = demoBundle()
        val engine = FakeEngine(bundle.manifest)
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 3)
        val events = chat.say("hi")
        assertEquals(0, engine.position)
        assertTrue(chat.turns.isEmpty())
        events.count()
        assertFailsWith<IllegalStateException> { events.count() }
    }

    @Test
    fun numbersAreThoseOfTheClock() {
        val bundle = demoBundle(chunk = 5)
        var now = 0L
        val engine = FakeEngine(bundle.manifest) { now += 500_000_000 }
        val chat = Conversation(bundle, engine, Sampling(), maxNewTokens = 4, nanoTime = { now })
        val prompt = Chat.encode(bundle, listOf(Message(Role.USER, "hello there"))).size
        val numbers = (chat.say("hello there").last() as Event.Done).numbers
        val calls = (prompt + 4) / 5
        assertEquals(prompt, numbers.promptTokens)
        assertEquals(4, numbers.newTokens)
        assertEquals(0.5 * calls, numbers.firstTokenSeconds, 1e-9)
        assertEquals(prompt / (0.5 * calls), numbers.prefillTokensPerSecond, 1e-9)
        assertEquals(2.0, numbers.decodeTokensPerSecond, 1e-9)
        assertEquals(prompt + 3, numbers.contextUsed)
        assertEquals(400, numbers.context)
    }

    private companion object {
        val WORDS = listOf("cat", "déjà", "the", "🦊", "\n", "<eos>")
    }
}
