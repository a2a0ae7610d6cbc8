package org.gemmaedge.app

import android.app.Application
import android.content.ComponentCallbacks2
import android.system.Os
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import org.gemmaedge.app.model.AppModel
import org.gemmaedge.engines.Engines

/**
 * Holds the [model] of the app for the whole process, so that at most one language model is in memory, whichever activity
 * shows it, and a rotation changes nothing. Conversations are on disk, for when the system ends the process.
 */
class GemmaEdge : Application() {
    val model: AppModel by lazy {
        AppModel(AndroidPlatform(this), Engines, CoroutineScope(SupervisorJob() + Dispatchers.Default))
    }

    override fun onCreate() {
        super.onCreate()
        // ONNX Runtime reads it when its library is loaded: no events are gathered, stored or sent.
        Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
    }

    @Suppress("DEPRECATION") // Older systems still send the critical level.
    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL || level >= ComponentCallbacks2.TRIM_MEMORY_BACKGROUND) {
            model.onLowMemory()
        }
    }

    @Deprecated("Older systems still call it.")
    override fun onLowMemory() {
        @Suppress("DEPRECATION")
        super.onLowMemory()
        model.onLowMemory()
    }
}
