package org.gemmaedge.app

import android.content.Intent
import android.os.Bundle
import android.view.WindowManager
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.activity.enableEdgeToEdge
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.collectAsState
import androidx.compose.runtime.getValue
import org.gemmaedge.app.model.BenchmarkRequest
import org.gemmaedge.app.screens.RemoteBenchmark
import org.gemmaedge.app.screens.Theme

/**
 * Measures what a laptop asks for, writes `benchmarks/ID.json`, and ends. `gemma-edge bench --device adb` starts it.
 *
 * Extras: `bundle`, `format` and `report` (the ID), `prompt`, `new_tokens`, `repetitions` and, if wished, `threads`.
 */
class BenchmarkActivity : ComponentActivity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        enableEdgeToEdge()
        super.onCreate(savedInstanceState)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        val benchmark = (application as GemmaEdge).model.benchmark
        // Not again after a rotation, or after the system ended the process.
        if (savedInstanceState == null) benchmark.start(request(intent), intent.getStringExtra("report").orEmpty())
        setContent {
            Theme {
                val state by benchmark.state.collectAsState()
                LaunchedEffect(state.running) { if (state.running == null) finish() }
                RemoteBenchmark(state, benchmark::stop)
            }
        }
    }

    override fun onDestroy() {
        super.onDestroy()
        // Closed by hand: Android would soon stop the app, and the laptop would wait for a report that never comes.
        val benchmark = (application as GemmaEdge).model.benchmark
        if (isFinishing && benchmark.state.value.running != null) benchmark.stop()
    }

    private fun request(intent: Intent): BenchmarkRequest {
        val usual = BenchmarkRequest(intent.getStringExtra("bundle").orEmpty(), intent.getStringExtra("format").orEmpty())
        return usual.copy(
            prompt = intent.getIntExtra("prompt", usual.prompt),
            newTokens = intent.getIntExtra("new_tokens", usual.newTokens),
            repetitions = intent.getIntExtra("repetitions", usual.repetitions),
            threads = if (intent.hasExtra("threads")) intent.getIntExtra("threads", 1) else null,
        )
    }
}
