package org.gemmaedge.core

import java.io.File
import java.lang.management.ManagementFactory
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue
import kotlinx.serialization.json.int
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive

class TokenizerTest {
    @Test
    fun idsAndTextsArePythons() {
        for (name in listOf("demo", "demo_vision", "odd", "added", "large")) {
            val tokenizer = TextVectors.tokenizer(name)
            val cases = TextVectors.json("$name.json")
            val special = cases.jsonObject.getValue("special").jsonObject.mapValues { it.value.jsonPrimitive.int }
            assertEquals(special, tokenizer.special, name)
            for (case in cases["encoded"]) {
                val text = case[0].text
                assertContentEquals(case[1].ids, tokenizer.encode(text, bos = false), "$name: '$text'")
                assertEquals(case[2].text, tokenizer.decode(case[1].ids), "$name: '$text'")
                assertTrue(case[1].ids.none { it in special.values })
            }
            for (case in cases["decoded"]) {
                val decoder = tokenizer.decoder()
                val pieces = case[0].ids.map { decoder.push(it) } + decoder.flush()
                assertEquals(case[1].text, pieces.joinToString(""), name)
                if (!case[2].isNull) assertEquals(case[2].jsonArray.map { it.text }, pieces, name)
            }
            println("tokenizer $name: ${cases["encoded"].size} strings, ${cases["decoded"].size} streams of ids")
        }
    }

    @Test
    fun bosIsInFrontIfAskedFor() {
        val tokenizer = TextVectors.tokenizer("demo")
        assertContentEquals(intArrayOf(2) + tokenizer.encode("a b", bos = false), tokenizer.encode("a b", bos = true))
        assertContentEquals(intArrayOf(2), tokenizer.encode("", bos = true))
    }

    @Test
    fun modelsThatAreNotGemmasAreRefusedInOneSentence() {
        val refused = checkNotNull(File(VectorFiles.folder("text"), "refused").listFiles())
        assertTrue(refused.size >= 12)
        for (file in refused) {
            val error = assertFailsWith<BadInput>(file.name) { Tokenizer(file.readBytes()) }
            assertTrue(error.message!!.startsWith("tokenizer.model") && '\n' !in error.message!!, error.message)
        }
    }

    @Test
    fun aDamagedModelIsRefusedOrReadButNeverBreaks() {
        val good = TextVectors.file("odd.model").readBytes()
        val draw = Random(1)
        var refused = 0
        repeat(3000) {
            val bytes = if (it % 3 == 0) good.copyOf(draw.nextInt(good.size)) else good.copyOf()
            repeat(if (bytes.isEmpty()) 0 else draw.nextInt(1, 4)) {
                bytes[draw.nextInt(bytes.size)] = draw.nextInt().toByte()
            }
            try {
                Tokenizer(bytes).encode("abc <é漢", bos = true)
            } catch (error: BadInput) {
                refused++
            }
        }
        assertTrue(refused > 1000, "$refused")
    }

    @Test
    fun aLoneSurrogateIsRefused() {
        val tokenizer = TextVectors.tokenizer("demo")
        for (text in listOf("\uD83E", "a\uDD8A", "\uD83E\uD83E\uDD8A", "\uDD8A\uD83E", "x\uD83E y")) {
            val error = assertFailsWith<BadInput> { tokenizer.encode(text, bos = false) }
            assertTrue("lone surrogate U+D" in error.message!!, error.message)
        }
        assertEquals("\uD83E\uDD8A", tokenizer.decode(tokenizer.encode("\uD83E\uDD8A", bos = false)))
    }

    @Test
    fun textSurvivesAndStreamsInWholeCharacters() {
        val tokenizer = TextVectors.tokenizer("demo")
        val draw = Random(2)
        repeat(2000) {
            val text = buildString {
                repeat(draw.nextInt(20)) {
                    val point = draw.nextInt(if (draw.nextBoolean()) 0x250 else 0x110000)
                    if (point !in 0xD800..0xDFFF && point != 0x2581) appendCodePoint(point)
                }
            }
            val ids = tokenizer.encode(text, bos = true)
            assertEquals(text, tokenizer.decode(ids))
            val decoder = tokenizer.decoder()
            val pieces = ids.map { decoder.push(it) }
            assertEquals("", decoder.flush())
            for (piece in pieces.filter { it.isNotEmpty() }) {
                assertTrue(!piece.first().isLowSurrogate() && !piece.last().isHighSurrogate())
            }
        }
    }

    @Test
    fun timeGrowsAsTheTextDoes() {
        val bytes = TextVectors.file("large.model").readBytes()
        val loads = List(3) { seconds { Tokenizer(bytes) } }
        val tokenizer = Tokenizer(bytes)
        println("262144 pieces: read in ${loads.joinToString { "%.3f".format(it) }} s")
        for (unit in listOf("a", " ", "\n", "漢", "ab", "<", "\u0301", "the cat ", "<start_of_")) {
            val times = listOf(100_000, 100_000, 400_000).map { size ->
                val text = unit.repeat(size / unit.length)
                seconds { tokenizer.encode(text, bos = false) }
            }
            println("'${unit.trim()}': 100 kB ${"%.3f".format(times[1])} s, 400 kB ${"%.3f".format(times[2])} s")
            assertTrue(times[2] < 0.5 + 16 * times[1], "'$unit': $times") // quadratic: 16 times
            assertTrue(times[1] < 2, "'$unit': $times")
        }
        assertTrue(loads.min() < 2, "$loads")
    }

    /** Of this thread, whatever else the machine does. */
    private fun seconds(work: () -> Unit): Double {
        val threads = ManagementFactory.getThreadMXBean()
        val start = threads.currentThreadCpuTime
        work()
        return (threads.currentThreadCpuTime - start) / 1e9
    }
}
