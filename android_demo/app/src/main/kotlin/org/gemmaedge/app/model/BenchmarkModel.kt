package org.gemmaedge.app.model

import java.io.File
import java.io.IOException
import kotlin.coroutines.cancellation.CancellationException
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import org.gemmaedge.core.BadInput
import org.gemmaedge.core.Benchmark
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.DoesNotFit
import org.gemmaedge.core.EngineFactory
import org.gemmaedge.core.Gauges
import org.gemmaedge.core.Measurement
import org.gemmaedge.core.MemoryBudget

/** What to measure: llama-bench's pp [prompt] and tg [newTokens]. */
data class BenchmarkRequest(
    val bundle: String,
    val format: String,
    val prompt: Int = 128,
    val newTokens: Int = 32,
    val repetitions: Int = 5,
    val threads: Int? = null,
)

/** What the laptop reads: measurements, or the sentence that says why there are none. */
@Serializable
data class BenchmarkReport(
    @SerialName("schema_version") val schemaVersion: Int = 1,
    val bundle: String? = null,
    val device: Device? = null,
    val measurements: List<Measurement>? = null,
    val error: String? = null,
) {
    /** As JSON, without the keys that this report has nothing for. */
    fun toJson(): String {
        val all = JSON.encodeToJsonElement(serializer(), this) as JsonObject
        return JSON.encodeToString(JsonObject.serializer(), JsonObject(all.filterValues { it != JsonNull }))
    }

    private companion object {
        val JSON = Json {
            prettyPrint = true
            encodeDefaults = true
        }
    }
}

/** The screen of benchmarks. [reports] are those of this run of the app, the newest first. */
data class BenchmarkState(
    val running: BenchmarkRequest? = null,
    val progress: Float = 0f,
    val reports: List<BenchmarkReport> = emptyList(),
    val error: String? = null,
)

/** Measures a bundle's graphs, each opened for the measurement alone. */
class BenchmarkModel(
    private val platform: Platform,
    private val host: EngineHost,
    private val factory: EngineFactory,
) {
    private val mutable = MutableStateFlow(BenchmarkState())

    val state: StateFlow<BenchmarkState> = mutable.asStateFlow()

    /** Measures. With a [reportId] the report is also written to `benchmarks/ID.json`, errors included. */
    fun start(request: BenchmarkRequest, reportId: String? = null): Job {
        mutable.update { it.copy(running = request, progress = 0f, error = null) }
        val job = host.alone("${request.bundle} (.${request.format}) for a benchmark") { cancelled ->
            val report = try {
                measure(request, cancelled)
            } catch (_: CancellationException) {
                BenchmarkReport(error = "The benchmark was stopped.")
            } catch (error: Throwable) {
                BenchmarkReport(error = sentence(error))
            }
            val written = try {
                if (reportId != null) write(reportId, report)
                null
            } catch (error: Exception) {
                sentence(error)
            }
            mutable.update {
                val reports = if (report.error == null) listOf(report) + it.reports else it.reports
                val next = it.running.takeIf { running -> running !== request } // one that took this one's place
                it.copy(running = next, reports = reports, error = report.error ?: written)
            }
        }
        job.invokeOnCompletion { mutable.update { if (it.running === request) it.copy(running = null) else it } }
        return job
    }

    fun stop() = host.stop()

    private fun measure(request: BenchmarkRequest, cancelled: () -> Boolean): BenchmarkReport {
        val name = request.bundle
        val folder = File(platform.bundles, name)
        if (BundleImport.safeName(name) != name || !folder.isDirectory) {
            throw BadInput("the app has no model named $name; copy it with gemma-edge push first")
        }
        val bundle = Bundle.read(folder)
        val artifact = bundle.artifact(request.format)
        platform.runtimes.problem(request.format, artifact)?.let { throw BadInput(it) }
        val free = platform.freeMemory()
        val fit = MemoryBudget.fit(artifact, free.available, free.lowThreshold)
        if (!fit.fits) throw DoesNotFit(fit.sentence)
        val benchmark = Benchmark(bundle, request.format, request.threads, factory, gauges())
        val measurement = benchmark.run(request.prompt, request.newTokens, request.repetitions) { done, total ->
            if (cancelled()) throw CancellationException("the benchmark was stopped")
            mutable.update { it.copy(progress = done.toFloat() / total) }
        }
        return BenchmarkReport(bundle = name, device = platform.device, measurements = listOf(measurement))
    }

    private fun gauges() = object : Gauges {
        override fun peakRssBytes() = peakProcessMemory()

        override fun thermalStatus() = platform.thermalStatus()
    }

    /** The laptop waits for the file, so it appears whole. */
    private fun write(id: String, report: BenchmarkReport) {
        if (!ID.matches(id)) throw BadInput("\"${id.take(40)}\" is no report's name; use letters, digits, . _ and -")
        platform.benchmarks.mkdirs()
        val part = File(platform.benchmarks, "$id.json.part")
        part.writeText(report.toJson() + "\n")
        if (!part.renameTo(File(platform.benchmarks, "$id.json"))) throw IOException("$id.json cannot be written")
    }

    private companion object {
        val ID = Regex("[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
    }
}
