package org.gemmaedge.engines

import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import javax.imageio.ImageIO
import kotlin.system.exitProcess
import kotlinx.serialization.Serializable
import kotlinx.serialization.encodeToString
import kotlinx.serialization.json.Json
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Call
import org.gemmaedge.core.Conversation
import org.gemmaedge.core.Engine
import org.gemmaedge.core.Event
import org.gemmaedge.core.Images
import org.gemmaedge.core.Pixels
import org.gemmaedge.core.Raster
import org.gemmaedge.core.Sampling
import org.gemmaedge.core.SelfCheck
import org.gemmaedge.core.UserError

/** What to feed: text as ids, or the file of an image's RGB bytes; then [newTokens] greedy tokens. */
@Serializable
class Request(val calls: List<Input>, val newTokens: Int)

@Serializable
class Input(val ids: List<Int> = emptyList(), val image: String? = null)

@Serializable
class Replayed(val tokens: List<Int>, val loadSeconds: Double, val promptSeconds: Double, val decodeSeconds: Double)

/** The checks that did not pass; or one sentence, if the bundle was refused before. */
@Serializable
class Verdict(val passed: Boolean, val checks: Int, val failed: List<String>, val refused: String?)

@Serializable
class Answer(val text: String)

/**
 * Runs the app's engines on a laptop, for android_demo/ci/replay.py, which does the same in Python. Prints JSON.
 *
 * * `generate BUNDLE FORMAT REQUEST LOGITS`: feeds a request. The logits before each token are written to LOGITS.
 * * `chat BUNDLE FORMAT TOKENS TEXT [PICTURE]`: one turn of a greedy conversation.
 * * `check BUNDLE FORMAT`: the hashes of the files, then the self-check.
 */
fun main(arguments: Array<String>) {
    val (command, folder, format) = arguments
    val rest = arguments.drop(3)
    println(
        when (command) {
            "generate" -> Json.encodeToString(generate(File(folder), format, File(rest[0]), File(rest[1])))
            "chat" -> Json.encodeToString(chat(File(folder), format, rest[0].toInt(), rest[1], rest.getOrNull(2)))
            "check" -> Json.encodeToString(check(File(folder), format))
            else -> error("no command $command")
        },
    )
    exitProcess(0) // fbjni has a thread that would keep the process alive.
}

private fun generate(folder: File, format: String, request: File, logitsFile: File): Replayed {
    val bundle = Bundle.read(folder)
    val asked = Json.decodeFromString<Request>(request.readText())
    val started = System.nanoTime()
    Engines.open(bundle, format, threads = 1).use { engine ->
        val loaded = seconds(started)
        val runs = List(RUNS) { run(engine, asked, bundle) }
        write(logitsFile, runs.last().rows)
        return Replayed(runs.last().tokens, loaded, runs.minOf { it.promptSeconds }, runs.minOf { it.decodeSeconds })
    }
}

private class Run(val tokens: List<Int>, val rows: List<FloatArray>, val promptSeconds: Double, val decodeSeconds: Double)

private fun run(engine: Engine, asked: Request, bundle: Bundle): Run {
    engine.reset()
    val started = System.nanoTime()
    var logits = FloatArray(0)
    for (call in asked.calls.map { it.toCall(bundle, engine) }) logits = engine.feed(call)
    val prompt = seconds(started)
    val prefilled = System.nanoTime()
    val rows = mutableListOf<FloatArray>()
    val tokens = mutableListOf<Int>()
    while (tokens.size < asked.newTokens) {
        rows += logits
        tokens += greedy(logits, bundle.manifest.model.vision?.imageTokenId)
        if (tokens.size < asked.newTokens) logits = engine.feed(Call.Text(intArrayOf(tokens.last())))
    }
    return Run(tokens, rows, prompt, seconds(prefilled))
}

private fun Input.toCall(bundle: Bundle, engine: Engine): Call {
    if (image == null) return Call.Text(ids.toIntArray())
    return Call.Image(engine.encode(Pixels(checkNotNull(bundle.manifest.model.vision).imageSize, File(image).readBytes())))
}

/** The most likely token; an image token is never drawn. */
private fun greedy(logits: FloatArray, imageToken: Int?): Int {
    var best = if (imageToken == 0) 1 else 0
    for (index in logits.indices) if (logits[index] > logits[best] && index != imageToken) best = index
    return best
}

private fun chat(folder: File, format: String, newTokens: Int, text: String, picture: String?): Answer {
    val bundle = Bundle.read(folder)
    Engines.open(bundle, format, threads = 1).use { engine ->
        val pictures = listOfNotNull(picture).map { file ->
            val size = checkNotNull(bundle.manifest.model.vision).imageSize
            Images.prepare(File(file).readBytes(), ::decode, size, panAndScan = false)
        }
        val conversation = Conversation(bundle, engine, Sampling(), seed = 0, maxNewTokens = newTokens)
        return Answer(conversation.say(text, pictures).filterIsInstance<Event.Text>().joinToString("") { it.piece })
    }
}

private fun decode(bytes: ByteArray): Raster {
    val image = ImageIO.read(bytes.inputStream())
    return Raster(image.width, image.height, image.getRGB(0, 0, image.width, image.height, null, 0, image.width))
}

private fun check(folder: File, format: String): Verdict = try {
    val bundle = Bundle.read(folder)
    Bundle.verify(bundle)
    val result = Engines.open(bundle, format, threads = 1).use { SelfCheck(bundle, format, it).run() }
    Verdict(result.passed, result.rows.size, result.rows.filterNot { it.passed }.map { it.id }, null)
} catch (error: UserError) {
    Verdict(false, 0, emptyList(), error.message)
}

private fun seconds(since: Long) = (System.nanoTime() - since) / 1e9

/** The fastest counts: the first is slowed by the JVM's compiler. */
private const val RUNS = 3

private fun write(file: File, rows: List<FloatArray>) {
    val buffer = ByteBuffer.allocate(rows.sumOf { it.size } * Float.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN)
    for (row in rows) for (value in row) buffer.putFloat(value)
    file.writeBytes(buffer.array())
}
