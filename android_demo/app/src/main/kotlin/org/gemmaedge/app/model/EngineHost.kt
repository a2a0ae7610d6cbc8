package org.gemmaedge.app.model

import java.io.File
import java.io.IOException
import java.util.concurrent.ExecutorService
import java.util.concurrent.Executors
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.Job
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.map
import kotlinx.coroutines.launch
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.Call
import org.gemmaedge.core.DoesNotFit
import org.gemmaedge.core.Engine
import org.gemmaedge.core.EngineFactory
import org.gemmaedge.core.MemoryBudget

/** A file that is there while a model is loaded. If it is there when the app starts, loading ended the app. */
class LoadMarker(private val file: File) {
    /** Where there is no room for a marker, loading goes on without one. */
    fun set(what: String) {
        try {
            file.parentFile?.mkdirs()
            file.writeText(what)
        } catch (_: IOException) {
            clear()
        }
    }

    fun clear() {
        file.delete()
    }

    /** The sentence about a load that ended the app, once. */
    fun takeSentence(): String? {
        if (!file.exists()) return null
        val what = try {
            file.readText()
        } catch (_: IOException) {
            "a model"
        }
        clear()
        return "The app was ended while it loaded $what: it probably needs more memory than this phone has; close other " +
            "apps, or use a smaller model."
    }
}

/** Which model is in memory. */
sealed interface Load {
    /** No model. [sentence] says why, if there was one. */
    data class Empty(val sentence: String? = null) : Load

    data class Loading(val name: String, val format: String) : Load

    data class Ready(val bundle: Bundle, val format: String) : Load {
        val name: String get() = bundle.folder.name
    }
}

/** The model in memory: loads, feeds and closes it, all on one thread. At most one piece of work runs at a time. */
class EngineHost(
    private val platform: Platform,
    private val factory: EngineFactory,
    private val marker: LoadMarker,
    private val scope: CoroutineScope,
) {
    private val executor: ExecutorService = Executors.newSingleThreadExecutor { Thread(it, "engine").apply { isDaemon = true } }
    private val thread = executor.asCoroutineDispatcher()
    private val mutable = MutableStateFlow<Load>(Load.Empty(marker.takeSentence()))
    private var engine: Engine? = null // belongs to the thread
    private var owner: Any? = null // belongs to the thread
    private val running = MutableStateFlow<Job?>(null)

    val load: StateFlow<Load> = mutable.asStateFlow()

    /** Whether work runs or waits. Screens offer no other work meanwhile. */
    val busy: Flow<Boolean> = running.map { it != null }

    /** Loads the graph of [format] in place of the one in memory. What goes wrong is in [load] as a sentence. */
    fun load(bundle: Bundle, format: String, threads: Int? = null): Job {
        stop()
        return scope.launch(thread) {
            try {
                open(bundle, format, threads)
            } catch (error: Throwable) {
                close(sentence(error))
            }
        }
    }

    /** Ends the work that runs, and lets the model go. [sentence] tells the user why, if it was not their wish. */
    fun unload(sentence: String? = null): Job {
        stop()
        return scope.launch(thread) { if (mutable.value is Load.Ready) close(sentence) }
    }

    /** Lets the work that runs end after the current call of the graph. */
    fun stop() {
        running.value?.cancel()
    }

    /**
     * Runs [block] on the engine's thread, if a model is in memory then, after ending the work before it.
     *
     * `cancelled` says that it must end. `fresh` says that the caches do not hold what [user] left in them: it is another
     * engine, or another user fed it.
     */
    fun run(
        user: Any, block: (ready: Load.Ready, engine: Engine, fresh: Boolean, cancelled: () -> Boolean) -> Unit,
    ): Job = start { own ->
        val ready = mutable.value as? Load.Ready ?: return@start
        val fresh = owner !== user
        owner = user
        block(ready, engine!!, fresh) { !own.isActive }
    }

    /** Runs [block] on the engine's thread with no model in memory; [marker] says it while it runs. */
    fun alone(what: String, block: (cancelled: () -> Boolean) -> Unit): Job = start { own ->
        if (mutable.value is Load.Ready) close("The model was let go for the benchmark; tap Load to chat again.")
        marker.set(what)
        try {
            block { !own.isActive }
        } finally {
            marker.clear()
        }
    }

    /** Ends everything. The host cannot be used any more. */
    fun shutDown() {
        stop()
        executor.execute { close(null) }
        executor.shutdown()
    }

    private fun start(block: (own: Job) -> Unit): Job {
        stop()
        val job = scope.launch(thread, CoroutineStart.LAZY) { block(coroutineContext[Job]!!) }
        running.value = job
        job.invokeOnCompletion { running.compareAndSet(job, null) }
        job.start()
        return job
    }

    private fun open(bundle: Bundle, format: String, threads: Int?) {
        close(null)
        mutable.value = Load.Loading(bundle.folder.name, format)
        val artifact = bundle.artifact(format)
        platform.runtimes.problem(format, artifact)?.let { throw DoesNotFit(it) }
        val free = platform.freeMemory()
        val fit = MemoryBudget.fit(artifact, free.available, free.lowThreshold)
        if (!fit.fits) throw DoesNotFit(fit.sentence)
        marker.set("${bundle.folder.name} (.$format)")
        try {
            val opened = factory.open(bundle, format, threads)
            engine = opened
            // The first call takes the rest of the memory, so it belongs to loading.
            opened.feed(Call.Text(intArrayOf(bundle.manifest.tokenizer.bosId)))
            opened.reset()
            mutable.value = Load.Ready(bundle, format)
        } finally {
            marker.clear()
        }
    }

    private fun close(sentence: String?) {
        try {
            engine?.close()
        } catch (_: Exception) {
            // The model is let go anyway.
        }
        engine = null
        owner = null
        mutable.value = Load.Empty(sentence)
    }
}
