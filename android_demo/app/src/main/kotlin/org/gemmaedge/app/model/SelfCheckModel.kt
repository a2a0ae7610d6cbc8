package org.gemmaedge.app.model

import kotlin.coroutines.cancellation.CancellationException
import kotlinx.coroutines.Job
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import org.gemmaedge.core.Bundle
import org.gemmaedge.core.SelfCheck
import org.gemmaedge.core.SelfCheckResult

/** The screen of the self-check. [model] is the one that was checked, [step] says what is being done. */
data class SelfCheckState(
    val model: String? = null,
    val step: String? = null,
    val progress: Float = 0f,
    val result: SelfCheckResult? = null,
    val error: String? = null,
)

/** Proves that the model in memory is, on this phone, what its bundle says: its files' hashes, then its proof. */
class SelfCheckModel(private val host: EngineHost) {
    private val mutable = MutableStateFlow(SelfCheckState())
    @Volatile private var latest: Job? = null

    val state: StateFlow<SelfCheckState> = mutable.asStateFlow()

    fun start() {
        val job = host.run(this) { ready, engine, _, cancelled ->
            val model = "${ready.name} (.${ready.format})"
            fun step(words: String, done: Long, total: Long) {
                mutable.value = SelfCheckState(model, words, if (total > 0) done.toFloat() / total else 0f)
            }
            mutable.value = try {
                step(HASHES, 0, 1)
                Bundle.verify(ready.bundle) { done, total ->
                    if (cancelled()) throw CancellationException("the self-check was stopped")
                    step(HASHES, done, total)
                }
                val result = SelfCheck(ready.bundle, ready.format, engine).run(cancelled) { done, total ->
                    step("Replaying the proof", done, total)
                }
                SelfCheckState(model, result = result)
            } catch (_: CancellationException) {
                SelfCheckState(model, error = "The self-check was stopped.")
            } catch (error: Throwable) {
                SelfCheckState(model, error = sentence(error))
            }
        }
        latest = job
        job.invokeOnCompletion { if (latest === job && mutable.value.step != null) mutable.value = SelfCheckState() }
    }

    fun stop() = host.stop()

    private companion object {
        const val HASHES = "Comparing the sha256 of each file"
    }
}
