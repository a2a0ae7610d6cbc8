package org.gemmaedge.engines

import ai.onnxruntime.NodeInfo
import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OnnxTensorLike
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.io.IOException
import java.nio.FloatBuffer
import java.nio.LongBuffer
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.CacheLayout
import org.gemmaedge.core.Call
import org.gemmaedge.core.Engine
import org.gemmaedge.core.LayerCache
import org.gemmaedge.core.Pixels
import org.gemmaedge.core.SoftTokens

/**
 * An .onnx, run by ONNX Runtime on the CPU.
 *
 * The caches are one set of tensors, given as past and as present, so a call updates them in place. The vision model is
 * loaded for the first image and let go before the next call of the text model.
 */
internal class OnnxEngine(bundle: Bundle, threads: Int?) : Engine {
    override var position = 0
        private set

    private val artifact = bundle.artifact("onnx")
    private val model = bundle.manifest.model
    private val opened = ArrayDeque<AutoCloseable>()
    private val environment = environment(bundle.file(artifact.file))
    private val text =
        Graph(environment, bundle.file(artifact.file), threads, required = SOFT_TOKENS).also(opened::addFirst)
    private val visionFile = artifact.methods.find { it.name == "vision_encoder" }?.let { bundle.file(it.file) }
    private val openVision = { file: File -> Graph(environment, file, threads, planMemory = false) }
    private var vision: Graph? = null

    private val mask = longs(artifact.cache.context).apply { while (hasRemaining()) put(1) }
    private val logits = floats(model.vocabSize)
    private val caches = LinkedHashMap<String, OnnxTensor>()
    private val outputs = LinkedHashMap<String, OnnxTensor>()

    init {
        try {
            check()
            artifact.cache.layers.forEachIndexed { index, layer ->
                for (part in PARTS) {
                    val cache = zeros(layer).also(opened::addFirst)
                    caches["past_key_values.$index.$part"] = cache
                    outputs["present.$index.$part"] = cache
                }
            }
            outputs["logits"] = tensor(logits, 1, 1, model.vocabSize).also(opened::addFirst)
        } catch (error: OrtException) {
            close()
            throw BadInput("${artifact.file}: ONNX Runtime cannot hold its caches (${reason(error)}); free some memory")
        } catch (error: Throwable) { // no memory for the caches, above all
            close()
            throw error
        }
    }

    override fun feed(call: Call): FloatArray {
        release()
        val end = position + call.length
        guarded(artifact.file) {
            val inputs = LinkedHashMap<String, OnnxTensorLike>(caches)
            inputs["input_ids"] = when (call) {
                is Call.Text -> tensor(idsBuffer(call.ids), 1, call.length)
                is Call.Image -> tensor(longs(1).readable(0), 1, 0)
            }
            inputs["attention_mask"] = tensor(mask.duplicate().readable(end), 1, end)
            if (visionFile != null) inputs[SOFT_TOKENS] = softTokens(call)
            try {
                text.session.run(inputs, outputs).close()
            } finally {
                for ((name, value) in inputs) if (name !in caches) value.close()
            }
        }
        position = end
        return FloatArray(model.vocabSize).also { logits.duplicate().readable().get(it) }
    }

    override fun encode(image: Pixels): SoftTokens {
        val file = visionFile ?: throw BadInput("the model of this bundle reads text only; leave the picture out")
        return guarded(file.name) {
            val graph = vision ?: openVision(file).also { vision = it }
            tensor(pixelsBuffer(image), 1, Pixels.CHANNELS, image.size, image.size).use { pixels ->
                graph.session.run(mapOf("pixels" to pixels)).use { result ->
                    val values = (result.get(0) as OnnxTensor).floatBuffer
                    val count = values.remaining() / model.hiddenSize
                    SoftTokens(count, model.hiddenSize, FloatArray(values.remaining()).also(values::get))
                }
            }
        }
    }

    /** The caches keep their bytes: the position alone decides which rows are read. */
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
        while (opened.isNotEmpty()) opened.removeFirst().close()
    }

    private fun release() {
        vision?.close()
        vision = null
    }

    private fun softTokens(call: Call): OnnxTensor {
        val values = (call as? Call.Image)?.softTokens?.values ?: FloatArray(0)
        // One number more, because an empty buffer has no address.
        val buffer = floats(values.size + 1).put(values).readable(values.size)
        return tensor(buffer, 1, values.size / model.hiddenSize, model.hiddenSize)
    }

    private fun tensor(buffer: FloatBuffer, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, buffer, shape.map(Int::toLong).toLongArray())

    private fun tensor(buffer: LongBuffer, vararg shape: Int): OnnxTensor =
        OnnxTensor.createTensor(environment, buffer, shape.map(Int::toLong).toLongArray())

    /**
     * A cache in memory of ONNX Runtime.
     *
     * Not over a direct buffer: Android takes those from the app's Java heap, which is too small for a large model's.
     */
    private fun zeros(layer: LayerCache): OnnxTensor {
        val rows: Any = when (artifact.cache.dtype) {
            CacheLayout.INT8 -> Array(1) { Array(layer.heads) { Array(layer.slots) { ByteArray(layer.headDim) } } }
            else -> Array(1) { Array(layer.heads) { Array(layer.slots) { FloatArray(layer.headDim) } } }
        }
        return OnnxTensor.createTensor(environment, rows)
    }

    /** The graph must have the shapes that the manifest describes, by which the buffers are allocated. */
    private fun check() {
        val expected = linkedMapOf(
            "input_ids" to listOf(1L, ANY),
            "attention_mask" to listOf(1L, ANY),
            "logits" to listOf(1L, 1L, model.vocabSize.toLong()),
        )
        if (visionFile != null) expected[SOFT_TOKENS] = listOf(1L, ANY, model.hiddenSize.toLong())
        val cached = HashSet<String>()
        artifact.cache.layers.forEachIndexed { index, layer ->
            for (group in listOf("past_key_values", "present")) for (part in PARTS) {
                cached += "$group.$index.$part"
                expected["$group.$index.$part"] =
                    listOf(1L, layer.heads.toLong(), layer.slots.toLong(), layer.headDim.toLong())
            }
        }
        val declared = text.session.inputInfo + text.session.outputInfo
        for ((name, shape) in expected) {
            val found = declared[name].description()
            val type = when {
                name in INTEGERS -> OnnxJavaType.INT64
                name in cached && artifact.cache.dtype == CacheLayout.INT8 -> OnnxJavaType.INT8
                else -> OnnxJavaType.FLOAT
            }
            val wanted = "$type $shape"
            if (found != wanted) {
                throw BadInput("${artifact.file}: $name is $found, expected $wanted; $ANOTHER_FILE")
            }
        }
    }

    private fun NodeInfo?.description(): String =
        (this?.info as? TensorInfo)?.let { "${it.type} ${it.shape.toList()}" } ?: "missing"

    private companion object {
        const val SOFT_TOKENS = "soft_tokens"
        const val ANY = -1L
        val PARTS = listOf("key", "value")
        val INTEGERS = setOf("input_ids", "attention_mask")
    }
}

/** A graph opened in ONNX Runtime. [planMemory]: see runtime_py/sessions/onnx.py. */
private class Graph(
    environment: OrtEnvironment,
    file: File,
    threads: Int?,
    planMemory: Boolean = true,
    required: String? = null,
) : AutoCloseable {
    // A session uses its options as long as it lives.
    private val options = OrtSession.SessionOptions()
    val session: OrtSession

    init {
        try {
            options.setMemoryPatternOptimization(planMemory)
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
            options.setIntraOpNumThreads(threads ?: 0)
            val graph = required?.let { withoutInitializer(file.readBytes(), it) }
            session = if (graph == null) {
                environment.createSession(file.path, options)
            } else {
                options.addConfigEntry("session.model_external_initializers_file_folder_path", file.parent)
                environment.createSession(graph, options)
            }
        } catch (error: OrtException) {
            options.close()
            throw BadInput("${file.name}: ONNX Runtime does not load it (${reason(error)}); $DAMAGED")
        } catch (error: IOException) {
            options.close()
            throw BadInput("${file.name}: it cannot be read (${reason(error)}); $DAMAGED")
        }
    }

    override fun close() {
        session.close()
        options.close()
    }
}

private fun environment(file: File): OrtEnvironment = try {
    OrtEnvironment.getEnvironment().also { it.setTelemetry(false) }
} catch (error: LinkageError) {
    throw BadInput("${file.name}: this device has no ONNX Runtime for its processor (${reason(error)}); use the .pte")
}

private inline fun <T> guarded(file: String, run: () -> T): T = try {
    run()
} catch (error: OrtException) {
    throw BadInput("$file: ONNX Runtime stopped (${reason(error)}); $CHECK_IT")
}
