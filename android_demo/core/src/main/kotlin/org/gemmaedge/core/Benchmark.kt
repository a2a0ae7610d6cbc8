package org.gemmaedge.core

import kotlin.math.sqrt
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable

/** Tokens per second over the repetitions. */
@Serializable
data class Rate(val mean: Double, val sd: Double, val median: Double) {
    companion object {
        fun of(rates: List<Double>): Rate {
            val mean = rates.average()
            val sd = if (rates.size > 1) sqrt(rates.sumOf { (it - mean) * (it - mean) } / (rates.size - 1)) else 0.0
            val sorted = rates.sorted()
            return Rate(mean, sd, (sorted[(sorted.size - 1) / 2] + sorted[sorted.size / 2]) / 2)
        }
    }
}

/** The speed, load time and memory of one graph of a bundle. The keys are those of `gemma-edge bench --json`. */
@Serializable
data class Measurement(
    val format: String,
    val prompt: Int,
    @SerialName("new_tokens") val newTokens: Int,
    val repetitions: Int,
    val threads: Int?,
    val prefill: Rate,
    val decode: Rate,
    @SerialName("load_seconds") val loadSeconds: Double,
    @SerialName("peak_rss_bytes") val peakRssBytes: Long,
    @SerialName("libraries_rss_bytes") val librariesRssBytes: Long,
    @SerialName("thermal_status") val thermalStatus: Int,
)

/** What the benchmark needs to know of the device. */
interface Gauges {
    /** The most memory that this process has had, in bytes. */
    fun peakRssBytes(): Long

    /** Android's thermal status, from 0 (none) to 6 (shutdown). */
    fun thermalStatus(): Int
}

/** Measures how fast the graph of [format] is and how much memory it takes, on the random tokens that Python uses. */
class Benchmark(
    private val bundle: Bundle,
    private val format: String,
    private val threads: Int?,
    private val factory: EngineFactory,
    private val gauges: Gauges,
    private val nanoTime: () -> Long = System::nanoTime,
) {
    /**
     * Prefills [prompt] tokens and decodes [newTokens]; [repetitions] such runs follow one that warms up. [progress]
     * gets the number of finished runs and that of all.
     *
     * Throws [BadInput] for counts below one, [DoesNotFit] when the tokens are over the context, and what opening the
     * graph throws.
     */
    fun run(
        prompt: Int = 128,
        newTokens: Int = 32,
        repetitions: Int = 5,
        progress: (done: Int, total: Int) -> Unit = { _, _ -> },
    ): Measurement {
        val counts = mapOf("tokens of prompt" to prompt, "new tokens" to newTokens, "repetitions" to repetitions)
        for ((name, count) in counts) if (count < 1) throw BadInput("the number of $name is $count; use 1 or more")
        val manifest = bundle.manifest
        if (prompt.toLong() + newTokens > manifest.context) {
            throw DoesNotFit(
                "$prompt and $newTokens tokens are over the bundle's context of ${manifest.context}; use fewer",
            )
        }
        val libraries = gauges.peakRssBytes()
        val start = nanoTime()
        return factory.open(bundle, format, threads).use { engine ->
            val loadSeconds = secondsSince(start)
            val ids = tokens(manifest, prompt + newTokens)
            val prefill = ArrayList<Double>()
            val decode = ArrayList<Double>()
            for (repetition in 0..repetitions) {
                engine.reset()
                val first = nanoTime()
                feeds(manifest, ids.copyOf(prompt)).forEach { engine.feed(Call.Text(it.ids)) }
                val prefillSeconds = secondsSince(first)
                val second = nanoTime()
                for (index in prompt until ids.size) engine.feed(Call.Text(intArrayOf(ids[index])))
                if (repetition > 0) { // the first one warms up
                    prefill += prompt / prefillSeconds
                    decode += newTokens / secondsSince(second)
                }
                progress(repetition + 1, repetitions + 1)
            }
            Measurement(
                format, prompt, newTokens, repetitions, threads, Rate.of(prefill), Rate.of(decode), loadSeconds,
                gauges.peakRssBytes(), libraries, gauges.thermalStatus(),
            )
        }
    }

    private fun secondsSince(start: Long): Double = maxOf(nanoTime() - start, 1) / 1e9

    private companion object {
        const val SEED = 0L

        fun tokens(manifest: Manifest, count: Int): IntArray = Random(SEED).integers(manifest.model.vocabSize, count)
            .apply { manifest.model.vision?.let { for (i in indices) if (this[i] == it.imageTokenId) this[i] = 0 } }
    }
}
