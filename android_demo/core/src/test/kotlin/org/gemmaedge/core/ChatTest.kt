package org.gemmaedge.core

import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonPrimitive

class ChatTest {
    private val tokenizer = TextVectors.tokenizer("demo")

    private fun parts(list: JsonElement): List<Part> =
        list.jsonArray.map { if (it.jsonPrimitive.isString) Part.Text(it.text) else Part.Image(it.jsonPrimitive.int) }

    @Test
    fun promptsArePythons() {
        val cases = TextVectors.json("chats.json")["chats"]
        var refused = 0
        for (case in cases) {
            val size = if (case[0].isNull) null else case[0].jsonPrimitive.int
            val messages = case[2].jsonArray.map { Message(Role.valueOf(it[0].text.uppercase()), parts(it[1])) }
            val prompt = case[1].jsonPrimitive.boolean
            if (case[3].isNull) {
                refused++
                val error = assertFailsWith<BadInput>("$case") { Chat.encode(tokenizer, size, messages, prompt) }
                assertTrue('\n' !in error.message!!, error.message)
            } else {
                assertContentEquals(case[3].ids, Chat.encode(tokenizer, size, messages, prompt), "$case")
            }
        }
        println("prompts: ${cases.size}, of which $refused refused")
        assertTrue(refused > 100)
    }

    @Test
    fun picturesAreWherePythonPutsThem() {
        val cases = TextVectors.json("chats.json")["placed"]
        for (case in cases) {
            val vision = if (case[2].jsonPrimitive.boolean) Vision(8, 4, 9, 7, 8) else null
            val crops = case[1].ids.toList()
            if (case[3].isNull) {
                assertFailsWith<BadInput>("$case") { Chat.place(case[0].text, crops, vision) }
            } else {
                val placed = Chat.place(case[0].text, crops, vision)
                assertEquals(shown(parts(case[3])), shown(placed), "$case")
            }
        }
    }

    private fun shown(parts: List<Part>) = parts.map { if (it is Part.Text) it.text else (it as Part.Image).crops }

    @Test
    fun whitespaceIsPythons() {
        val spaces = TextVectors.json("chats.json")["spaces"].ids.toSet()
        for (point in 0..0xFFFF) assertEquals(point in spaces, Chat.strip("${point.toChar()}").isEmpty(), "$point")
        assertTrue(spaces.all { it <= 0xFFFF })
    }

    @Test
    fun anotherFormThanGemmasIsRefused() {
        val bundle = demoBundle(chatFormat = "template")
        val messages = listOf(Message(Role.USER, "hi"))
        val error = assertFailsWith<BadInput> { Chat.encode(bundle, messages) }
        assertTrue("chat_format is template" in error.message!!)
        assertFailsWith<BadInput> { Conversation(bundle, FakeEngine(bundle.manifest), Sampling()) }
        val ids = Chat.encode(demoBundle(), messages)
        assertContentEquals(Chat.encode(tokenizer, null, messages), ids)
    }
}
