package org.gemmaedge.app

import java.io.File
import java.security.MessageDigest
import org.gemmaedge.app.model.Device
import org.gemmaedge.app.model.FreeMemory
import org.gemmaedge.app.model.Platform
import org.gemmaedge.app.model.Runtimes
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Call
import org.gemmaedge.core.Engine
import org.gemmaedge.core.EngineFactory
import org.gemmaedge.core.ImageDecoder
import org.gemmaedge.core.Pixels
import org.gemmaedge.core.Raster
import org.gemmaedge.core.SoftTokens
import org.gemmaedge.core.Tokenizer

val REPOSITORY = File(checkNotNull(System.getProperty("repository")) { "-Drepository=ROOT is missing" })

/** A laptop in place of the phone. */
class FakePlatform(override val root: File) : Platform {
    var free = FreeMemory(4_000_000_000, 500_000_000)
    var space = 1_000_000_000L
    override val device = Device("Pixel 9", "Tensor G4", "16", "arm64-v8a", 8)
    override val runtimes = Runtimes.SHIPPED
    override val decoder = ImageDecoder { bytes ->
        val image = javax.imageio.ImageIO.read(bytes.inputStream())
        Raster(image.width, image.height, image.getRGB(0, 0, image.width, image.height, null, 0, image.width))
    }

    override fun freeMemory() = free

    override fun freeSpace() = space

    override fun thermalStatus() = 1
}

/** Writes a small bundle: the demo's tokenizer, and graphs that are only bytes. */
object TestBundle {
    const val VOCABULARY = 4096

    fun write(
        folder: File, vision: Boolean = false, executorch: String = "1.4.1", schema: String = "4.0", graph: Int = 5000,
        change: (String) -> String = { it },
    ): File {
        folder.mkdirs()
        File(folder, "model.onnx").writeBytes(ByteArray(graph) { it.toByte() })
        File(folder, "model.pte").writeBytes(ByteArray(graph + 1) { (it * 7).toByte() })
        File(folder, "proof").mkdirs()
        File(folder, "proof/plan.json").writeText("{}")
        REPOSITORY.resolve("gemma3/demo_vision/tokenizer.model").copyTo(File(folder, "tokenizer.model"), overwrite = true)
        val names = listOf("model.onnx", "model.pte", "proof/plan.json", "tokenizer.model")
        val files = names.joinToString { """"$it": {"size": ${File(folder, it).length()}, "sha256": "${sha(File(folder, it))}"}""" }
        File(folder, "manifest.json").writeText(change(manifest(folder, files, vision, executorch, schema)))
        return folder
    }

    private fun manifest(folder: File, files: String, vision: Boolean, executorch: String, schema: String) = """
        {"schema_version": "$schema",
         "model": {"vocab_size": $VOCABULARY, "hidden_size": 8, "layer_types": ["sliding_attention", "full_attention"],
          "sliding_window": 64, "vision": ${if (vision) vision(folder) else "null"}},
         "recipe": "int4-block32+embedding-int8", "method": "rtn", "context": 512, "chunk": 32,
         "tokenizer": {"sha256": "${sha(File(folder, "tokenizer.model"))}", "bos_id": 2, "eos_ids": [1, 6],
          "special_ids": {"<start_of_turn>": 5, "<end_of_turn>": 6}},
         "artifacts": {"onnx": ${artifact("onnx", """{"onnxruntime": "1.31.1"}""")},
          "pte": ${artifact("pte", """{"executorch": "$executorch"}""")}},
         "files": {$files}, "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0}}
    """.trimIndent()

    private fun artifact(format: String, versions: String) = """
        {"file": "model.$format", "files": ["model.$format"], "methods": [], "references": ["int8"], "versions": $versions,
         "bytes": 5000, "peak_memory_estimate": 1200000000,
         "cache": {"style": "ring", "context": 512, "chunk": 32, "layers": [
          {"kind": "sliding_attention", "slots": 96, "num_key_value_heads": 1, "head_dim": 4},
          {"kind": "full_attention", "slots": 512, "num_key_value_heads": 1, "head_dim": 4}]}}
    """.trimIndent()

    private fun vision(folder: File): String {
        val token = Tokenizer(File(folder, "tokenizer.model").readBytes()).specialId("<image_soft_token>")
        return """{"image_size": 8, "tokens_per_image": 4, "image_token_id": $token, "begin_image_token_id": 7,
            "end_image_token_id": 8}"""
    }

    fun sha(file: File) = MessageDigest.getInstance("SHA-256").digest(file.readBytes()).joinToString("") { "%02x".format(it) }
}

/** Says [answer] after every prompt, then `<end_of_turn>`. [beforeFeed] runs at each call. */
class FakeEngine(bundle: Bundle, answer: String, private val beforeFeed: (Call) -> Unit) : Engine {
    private val script = bundle.tokenizer.encode(answer, bos = false) + 6
    private val vocabulary = bundle.manifest.model.vocabSize
    private val tokens = bundle.manifest.model.vision?.tokensPerImage ?: 0
    private var said = 0
    var closed = false
    override var position = 0

    override fun feed(call: Call): FloatArray {
        check(!closed) { "fed after close" }
        beforeFeed(call)
        position += call.length
        said = if (call is Call.Text && call.ids.size == 1 && call.ids[0] == script.getOrNull(said)) said + 1 else 0
        return FloatArray(vocabulary).also { it[script[said]] = 1f }
    }

    override fun encode(image: Pixels) = SoftTokens(tokens, 8, FloatArray(tokens * 8))

    override fun reset() {
        position = 0
        said = 0
    }

    override fun rewind(position: Int): Boolean {
        this.position = position
        return true
    }

    override fun close() {
        closed = true
    }
}

class FakeEngines(var answer: String = "Hello from the phone.", var beforeFeed: (Call) -> Unit = {}) : EngineFactory {
    val opened = mutableListOf<FakeEngine>()
    val threads = mutableSetOf<Thread>()

    override fun open(bundle: Bundle, format: String, threads: Int?): Engine =
        FakeEngine(bundle, answer) { call ->
            this.threads += Thread.currentThread()
            beforeFeed(call)
        }.also { opened += it }
}
