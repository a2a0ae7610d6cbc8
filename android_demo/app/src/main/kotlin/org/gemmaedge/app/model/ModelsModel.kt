package org.gemmaedge.app.model

import java.io.File
import kotlin.coroutines.cancellation.CancellationException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.MemoryBudget

/** One graph of a bundle, and whether this phone can load it. [sentence] says why, or why not. */
data class FormatRow(val format: String, val bytes: Long, val fits: Boolean, val sentence: String)

/** A folder of the app's models. [problem] says why it is no usable bundle, [unfinished] that its import was cut short. */
data class ModelRow(
    val name: String,
    val bytes: Long,
    val recipe: String = "",
    val context: Int = 0,
    val vision: Boolean = false,
    val formats: List<FormatRow> = emptyList(),
    val problem: String? = null,
    val unfinished: Boolean = false,
)

/** The screen of models. [message] is a sentence about the last action. */
data class ModelsState(
    val rows: List<ModelRow> = emptyList(),
    val progress: ImportProgress? = null,
    val message: String? = null,
)

/** The bundles on this phone: lists, imports and deletes them. */
class ModelsModel(
    private val platform: Platform,
    private val host: EngineHost,
    private val scope: CoroutineScope,
    private val io: CoroutineDispatcher = Dispatchers.IO,
) {
    private val mutable = MutableStateFlow(ModelsState())
    @Volatile private var running: Job? = null
    @Volatile private var source: BundleSource? = null

    val state: StateFlow<ModelsState> = mutable.asStateFlow()

    /** Looks again at what is there; `gemma-edge push` adds bundles behind the app's back. */
    fun refresh(): Job = scope.launch(io) {
        // Made by the app: what adb's shell makes is the shell's, and the app might not write there.
        platform.bundles.mkdirs()
        platform.benchmarks.mkdirs()
        list { it }
    }

    fun load(name: String, format: String): Job = scope.launch(io) {
        try {
            host.load(Bundle.read(File(platform.bundles, name)), format)
        } catch (error: Throwable) {
            say(sentence(error))
        }
    }

    /** Imports from a source that [open] makes, on another thread. */
    fun import(open: () -> BundleSource) {
        if (mutable.value.progress != null) return
        mutable.update { it.copy(message = null, progress = ImportProgress("", BundleImport.MANIFEST, 0, 0)) }
        source = null
        running = scope.launch(io) {
            val own = coroutineContext[Job]!!
            val message = try {
                val from = open().also { source = it }
                val importer = BundleImport(platform.bundles, platform.runtimes, platform::freeSpace)
                val name = importer.run(from, { !own.isActive }) { seen -> mutable.update { it.copy(progress = seen) } }
                "$name is here: every file has the size and the sha256 of its manifest."
            } catch (_: CancellationException) {
                "The import was stopped." + if (source?.resumes == true) " Import the same address again to go on." else ""
            } catch (error: Throwable) {
                if (own.isActive) sentence(error) else "The import was stopped."
            }
            list { it.copy(progress = null, message = message) }
        }
    }

    fun stopImport() {
        running?.cancel()
        val from = source
        scope.launch(io) { from?.abort() }
    }

    /** Deletes a model, or what an unfinished import left. The model in memory is let go first. */
    fun delete(row: ModelRow): Job = scope.launch(io) {
        if ((host.load.value as? Load.Ready)?.name == row.name) host.unload().join()
        val folder = File(platform.bundles, if (row.unfinished) ".${row.name}.part" else row.name)
        val gone = folder.deleteRecursively()
        val message = if (gone) "${row.name} is deleted." else "Some files of ${row.name} cannot be deleted; try again."
        list { it.copy(message = message) }
    }

    fun dismiss() = mutable.update { it.copy(message = null) }

    private fun say(message: String) = mutable.update { it.copy(message = message) }

    /** The folders are read before the update, which begins again whenever an import goes on meanwhile. */
    private fun list(change: (ModelsState) -> ModelsState) {
        val rows = rows()
        mutable.update { change(it).copy(rows = rows) }
    }

    private fun rows(): List<ModelRow> = platform.bundles.listFiles().orEmpty().filter(File::isDirectory).sorted()
        .mapNotNull { folder ->
            val part = UNFINISHED.matchEntire(folder.name)
            when {
                part != null -> ModelRow(part.groupValues[1], size(folder), unfinished = true)
                folder.name.startsWith('.') -> null
                else -> row(folder)
            }
        }

    private fun row(folder: File): ModelRow = try {
        val bundle = Bundle.read(folder)
        val manifest = bundle.manifest
        val free = platform.freeMemory()
        val available = free.available + held()
        ModelRow(
            name = folder.name,
            bytes = size(folder),
            recipe = manifest.recipe,
            context = manifest.context,
            vision = manifest.model.vision != null,
            formats = manifest.artifacts.map { (format, artifact) ->
                val problem = platform.runtimes.problem(format, artifact)?.replaceFirstChar(Char::uppercase)?.plus(".")
                val fit = MemoryBudget.fit(artifact, available, free.lowThreshold)
                FormatRow(format, artifact.bytes, problem == null && fit.fits, problem ?: fit.sentence)
            },
        )
    } catch (error: Throwable) { // a hostile manifest may take all memory; the list must still be there
        ModelRow(folder.name, size(folder), problem = sentence(error))
    }

    /** The memory of the model that is let go before another is loaded. */
    private fun held(): Long {
        val ready = host.load.value as? Load.Ready ?: return 0
        return minOf(ready.bundle.artifact(ready.format).peakMemoryEstimate, ownMemory())
    }

    private fun size(folder: File): Long = folder.walk().filter(File::isFile).sumOf(File::length)

    private companion object {
        val UNFINISHED = Regex("""\.(.+)\.part""")
    }
}
