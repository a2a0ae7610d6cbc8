package org.gemmaedge.app

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import android.os.PowerManager
import java.io.File
import org.gemmaedge.app.model.Device
import org.gemmaedge.app.model.FreeMemory
import org.gemmaedge.app.model.Platform
import org.gemmaedge.app.model.Runtimes

/** This phone. */
class AndroidPlatform(private val context: Context) : Platform {
    override val root: File = context.getExternalFilesDir(null) ?: context.filesDir

    /** Not below [root], which other apps could read before Android 11. */
    override val conversations = File(context.filesDir, "conversations")

    override val device = Device(
        model = "${Build.MANUFACTURER} ${Build.MODEL}",
        soc = when {
            Build.VERSION.SDK_INT < Build.VERSION_CODES.S -> Build.HARDWARE
            else -> "${Build.SOC_MANUFACTURER} ${Build.SOC_MODEL}"
        },
        android = Build.VERSION.RELEASE,
        abi = Build.SUPPORTED_ABIS.first(),
        cores = java.lang.Runtime.getRuntime().availableProcessors(),
    )

    override val runtimes = Runtimes.SHIPPED

    override val decoder = AndroidPictures

    override fun freeMemory(): FreeMemory {
        val info = ActivityManager.MemoryInfo()
        context.getSystemService(ActivityManager::class.java).getMemoryInfo(info)
        return FreeMemory(info.availMem, info.threshold)
    }

    override fun freeSpace(): Long = root.usableSpace

    override fun thermalStatus(): Int {
        if (Build.VERSION.SDK_INT < Build.VERSION_CODES.Q) return 0
        return context.getSystemService(PowerManager::class.java).currentThermalStatus
    }
}
