package org.gemmaedge.engines

import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Call
import org.gemmaedge.core.Engine
import org.gemmaedge.core.Pixels
import org.gemmaedge.core.SoftTokens
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * A .pte, run by ExecuTorch, mapped into memory. The caches are inside the loaded program.
 *
 * The methods are `forward` for a text-only model, and `token_embedding`, `text_decoder` and `vision_encoder` for a
 * multimodal one. A `Module` cannot let go of one method, so the vision encoder has a module of its own over the same
 * file: it is opened for the first image and destroyed before the next call of the text model.
 */
internal class ExecuTorchEngine(bundle: Bundle, private val threads: Int?) : Engine {
    override var position = 0
        private set

    private val artifact = bundle.artifact("pte")
    private val model = bundle.manifest.model
    private val file = bundle.file(artifact.file)
    private val multimodal = model.vision != null
    private val decoder = if (multimodal) "text_decoder" else "forward"
    private val text: Module
    private var vision: Module? = null

    init {
        text = open(listOfNotNull(decoder, "token_embedding".takeIf { multimodal }))
        try {
            check()
        } catch (error: Throwable) { // a program whose answers have other types gives errors of its own
            text.destroy()
            throw error
        }
    }

    override fun feed(call: Call): FloatArray {
        release()
        val input = when (call) {
            is Call.Image -> EValue.from(withImageFlag(call.softTokens))
            is Call.Text -> {
                val ids = EValue.from(Tensor.fromBlob(idsBuffer(call.ids), longArrayOf(1, call.length.toLong())))
                if (multimodal) run(text, "token_embedding", ids) else ids
            }
        }
        val start = EValue.from(Tensor.fromBlob(idsBuffer(intArrayOf(position)), longArrayOf(1)))
        // A copy: the output is the program's own memory, which the next call overwrites.
        val logits = run(text, decoder, input, start).toTensor().dataAsFloatArray
        position += call.length
        return logits
    }

    override fun encode(image: Pixels): SoftTokens {
        if (!multimodal) throw BadInput("the model of this bundle reads text only; leave the picture out")
        val module = vision ?: open(listOf(ENCODER)).also { vision = it }
        val side = image.size.toLong()
        val pixels = Tensor.fromBlob(pixelsBuffer(image), longArrayOf(1, Pixels.CHANNELS.toLong(), side, side))
        val output = run(module, ENCODER, EValue.from(pixels)).toTensor()
        val (count, width) = output.shape().let { it[1].toInt() to it[2].toInt() - 1 }
        val values = output.dataAsFloatArray
        // Without the last channel, the image flag.
        return SoftTokens(count, width, FloatArray(count * width) { values[it / width * (width + 1) + it % width] })
    }

    /** The caches keep their bytes, because masks hide every slot not written since. */
    override fun reset() {
        release()
        position = 0
    }

    override fun rewind(position: Int): Boolean {
        if (!artifact.cache.canRewind(this.position, position, model.slidingWindow)) return false
        this.position = position
        return true
    }

    override fun close() {
        release()
        text.destroy()
    }

    private fun release() {
        vision?.destroy()
        vision = null
    }

    /** The text decoder's input for soft tokens: each with 1 (image) in a last channel. */
    private fun withImageFlag(tokens: SoftTokens): Tensor {
        val buffer = floats(tokens.count * (tokens.width + 1))
        for (row in 0 until tokens.count) buffer.put(tokens.values, row * tokens.width, tokens.width).put(1f)
        return Tensor.fromBlob(buffer.readable(), longArrayOf(1, tokens.count.toLong(), tokens.width + 1L))
    }

    private fun open(methods: List<String>): Module {
        val module = loading { Module.load(file.path, Module.LOAD_MODE_MMAP, threads ?: 0) }
        try {
            val found = module.getMethods()
            for (name in methods) {
                if (name !in found) {
                    throw BadInput("${artifact.file}: it has no method $name; $ANOTHER_FILE")
                }
                loading { module.loadMethod(name) }
            }
        } catch (error: BadInput) {
            module.destroy()
            throw error
        }
        return module
    }

    private fun check() {
        val expected = mapOf(
            "get_max_seq_len" to artifact.cache.chunk,
            "get_max_context_len" to artifact.cache.context,
            "get_vocab_size" to model.vocabSize,
        )
        val methods = text.getMethods()
        for ((name, value) in expected) {
            val declared = if (name in methods) run(text, name).toInt() else null
            if (declared != value.toLong()) {
                throw BadInput("${artifact.file}: $name is $declared, expected $value; $ANOTHER_FILE")
            }
        }
    }

    private fun run(module: Module, method: String, vararg inputs: EValue): EValue = try {
        module.execute(method, *inputs)[0]
    } catch (error: RuntimeException) {
        throw BadInput("${artifact.file}: ExecuTorch stopped in $method (${reason(error)}); $CHECK_IT")
    }

    private inline fun <T> loading(run: () -> T): T = try {
        run()
    } catch (error: RuntimeException) {
        throw BadInput("${artifact.file}: ExecuTorch does not load it (${reason(error)}); $DAMAGED")
    } catch (error: LinkageError) {
        val why = "this device has no ExecuTorch for its processor (${reason(error)})"
        throw BadInput("${artifact.file}: $why; use the .onnx")
    }

    private companion object {
        const val ENCODER = "vision_encoder"
    }
}
