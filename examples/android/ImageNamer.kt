// Names pictures on Android with LiteRT. From a bundle of `prgkit export --litert`, put model.tflite and manifest.json into
// app/src/main/assets, and into build.gradle.kts:
//   implementation("com.google.ai.edge.litert:litert:1.4.1")
// Never compiled where it was written.
import android.content.Context
import android.graphics.Bitmap
import java.io.Closeable
import java.nio.ByteBuffer
import java.nio.channels.FileChannel
import kotlin.math.exp
import kotlin.math.floor
import kotlin.math.min
import kotlin.math.roundToInt
import org.json.JSONObject
import org.tensorflow.lite.Interpreter

/** An open model; it is used by one thread at a time, such as that of CameraX's ImageAnalysis. */
class ImageNamer(context: Context, threads: Int = 4) : Closeable {
    data class Answer(val name: String, val probability: Float)

    private val manifest = JSONObject(context.assets.open("manifest.json").bufferedReader().use { it.readText() })
    private val classes = manifest.getJSONArray("classes").let { names -> List(names.length(), names::getString) }
    private val temperature = manifest.optJSONObject("confidence")?.getDouble("temperature") ?: 1.0
    private val preprocessing = manifest.getJSONObject("preprocessing")
    private val interpreter: Interpreter
    private val height: Int
    private val width: Int
    private val colours: IntArray
    private val pixels: ByteBuffer

    init {
        val file = context.assets.openFd("model.tflite")
        val model = file.createInputStream().channel
            .map(FileChannel.MapMode.READ_ONLY, file.startOffset, file.declaredLength)
        interpreter = Interpreter(model, Interpreter.Options().setNumThreads(threads))
        val shape = interpreter.getInputTensor(0).shape() // batch, height, width, 3
        height = shape[1]
        width = shape[2]
        colours = IntArray(height * width)
        pixels = ByteBuffer.allocateDirect(3 * height * width)
    }

    /** The likeliest classes of a bitmap (ARGB_8888, upright, any size), the first first. */
    fun name(picture: Bitmap, count: Int = 3): List<Answer> {
        prepared(picture).getPixels(colours, 0, width, 0, 0, width, height)
        pixels.rewind()
        for (colour in colours) for (shift in intArrayOf(16, 8, 0)) pixels.put((colour shr shift).toByte()) // RGB
        val logits = Array(1) { FloatArray(classes.size) }
        interpreter.run(pixels.rewind(), logits)
        val largest = logits[0].max()
        val shares = logits[0].map { exp((it - largest) / temperature) }
        val sum = shares.sum()
        return shares.indices.sortedByDescending { shares[it] }.take(count)
            .map { Answer(classes[it], (shares[it] / sum).toFloat()) }
    }

    /** Resize until the bitmap covers the crop, and crop the centre, as in training; not to the pixel, which is Pillow's. */
    private fun prepared(picture: Bitmap): Bitmap {
        if (preprocessing.getBoolean("squash")) return Bitmap.createScaledBitmap(picture, width, height, true)
        val crop = preprocessing.getDouble("crop")
        val ratio = min(picture.height / floor(height / crop), picture.width / floor(width / crop))
        var scaled = picture
        // Android's filter reads four pixels only: halve first, so that each of a large photograph's pixels counts.
        while (scaled.width * ratio > 2 * picture.width) {
            scaled = Bitmap.createScaledBitmap(scaled, scaled.width / 2, scaled.height / 2, true)
        }
        val toWidth = maxOf(width, (picture.width / ratio).roundToInt())
        val toHeight = maxOf(height, (picture.height / ratio).roundToInt())
        scaled = Bitmap.createScaledBitmap(scaled, toWidth, toHeight, true)
        return Bitmap.createBitmap(scaled, (toWidth - width) / 2, (toHeight - height) / 2, width, height)
    }

    override fun close() = interpreter.close()
}
